"""Checks that all requests share, without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from ldm.config.model_info import model_info
from ldm.inference.requests import ImageToImageRequest, TextToImageRequest
from ldm.inference.settings import lora_text, parse_lora
from ldm.paths import ROOT
from tests.shapes import config


@pytest.mark.parametrize("steps", [1, 2, 7, 999, 1000])
def test_every_step_count_of_the_schedule_is_accepted(steps):
    assert TextToImageRequest(steps=steps).checked(model_info(config())).steps == steps


@pytest.mark.parametrize(
    "sampler, eta", [("ddim", 0.0), ("plms", 0.0), ("ancestral", 1.0), ("euler_ancestral", 1.0), ("heun", 0.0)]
)
def test_eta_defaults_to_the_samplers_own(sampler, eta):
    assert TextToImageRequest(sampler=sampler).checked(model_info(config())).eta == eta
    assert TextToImageRequest(sampler=sampler, eta=eta).checked(model_info(config())).eta == eta


@pytest.mark.parametrize(
    "values, words",
    [
        ({"eta": 100.0}, "--ddim_eta 100.0: choose 0"),
        ({"eta": float("nan")}, "--ddim_eta nan: choose 0"),
        ({"scale": 1e30}, r"--scale 1e\+30: choose -1000 to 1000"),
        ({"scale": float("nan")}, "--scale nan"),
        ({"seed": -1}, "--seed -1: choose 0 to"),
        ({"seed": 2**70}, "--seed 1180591620717411303424: choose 0 to"),
        ({"n_samples": -2}, "--n_samples -2: choose 1 to 1,000,000"),
        ({"n_samples": 10**9}, "--n_samples 1000000000: choose 1"),
        ({"n_iter": 0}, "--n_iter 0: choose 1"),
        ({"height": 0}, "--H 0 --W 512: .* nearest are --H 64 --W 512"),
        ({"height": -64}, "--H -64 --W 512: .* nearest are --H 64 --W 512"),
        ({"width": 64 * 10**8}, "--W 6400000000: .* nearest are --H 512 --W 65536"),
        ({"prompt": "caf\udce9"}, r"--prompt 'caf\\udce9': not UTF-8 text \(character 4\)"),
        ({"prompt": ["a", "\ud83d"]}, "--prompt '.*: not UTF-8 text"),
        ({"negative_prompt": "\udcff"}, "--negative_prompt '.*: not UTF-8 text"),
    ],
)
def test_values_out_of_range_are_refused_with_the_range(values, words):
    with pytest.raises(ValueError, match=words):
        TextToImageRequest(**values).checked(model_info(config()))


def test_settings_that_have_no_effect_are_warned_about(caplog):
    info = model_info(config())
    TextToImageRequest(prompt="a cat", negative_prompt="a cat ").checked(info)
    TextToImageRequest(prompt=" ").checked(info)
    ImageToImageRequest(prompt="a cat", strength=0.01).checked(info)
    words = ["--negative_prompt is the prompt: --scale has no effect", "the prompt is empty: --scale has no effect"]
    words += ["--strength 0.01 of --ddim_steps 50 is less than one step, so the image stays; choose 100 steps or more"]
    assert [record.message for record in caplog.records] == words
    caplog.clear()
    TextToImageRequest(prompt=["a cat", ""], negative_prompt="a cat").checked(info)
    TextToImageRequest(prompt="", scale=1.0).checked(info)
    assert not caplog.records


def test_at_zero_terminal_snr_continuous_time_solvers_require_trailing_spacing():
    info = model_info(config(parameterization="v", zero_terminal_snr=True))
    with pytest.raises(
        ValueError, match=r"--spacing uniform: heun cannot start at zero terminal SNR, .* choose trailing"
    ):
        TextToImageRequest(sampler="heun").checked(info)
    assert (
        TextToImageRequest(sampler="heun", spacing="trailing").checked(info).spacing
        == TextToImageRequest(spacing="trailing").checked(info).spacing
    )


def test_checks_need_neither_torch_nor_lightning():
    code = (
        "import sys; from ldm import inference; from ldm.inference import cli; from ldm.paths import ROOT;"
        "info = inference.read_model_info(ROOT / 'configs/stable-diffusion/v1-inference.yaml');"
        "inference.TextToImageRequest(prompt='a cat', emphasis=True).checked(info);"
        "print([m for m in ('torch', 'pytorch_lightning', 'numpy', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_lora_is_a_file_and_its_strength_and_names_may_have_colons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "b:0.5", "c:d.pt", "C:\\loras\\e.safetensors"):
        (tmp_path / name).touch()
    for text, expected in {
        "a.safetensors": ("a.safetensors", 1.0),
        "a.safetensors:0.8": ("a.safetensors", 0.8),
        "a.safetensors:-1": ("a.safetensors", -1.0),
        "a.safetensors:1e-3": ("a.safetensors", 0.001),
        "b:0.5": ("b:0.5", 1.0),
        "b:0.5:2": ("b:0.5", 2.0),
        "c:d.pt": ("c:d.pt", 1.0),
        "c:d.pt:.25": ("c:d.pt", 0.25),
        "C:\\loras\\e.safetensors": ("C:\\loras\\e.safetensors", 1.0),
        "C:\\loras\\e.safetensors:0.5": ("C:\\loras\\e.safetensors", 0.5),
    }.items():
        assert parse_lora(text) == (Path(expected[0]), expected[1])
        assert parse_lora(lora_text(*parse_lora(text))) == parse_lora(text)
    for text in ("a.safetensors:nan", "a.safetensors:inf", "a.safetensors:1001"):
        with pytest.raises(ValueError, match="choose a strength of -1000 to 1000"):
            parse_lora(text)
    for text in (":1", "f.pt", "a.safetensors:", "a.safetensors:x", "C:\\loras\\g.safetensors"):
        with pytest.raises(FileNotFoundError, match="no such file; pass FILE or FILE:strength"):
            parse_lora(text)
    trained = Path("run/checkpoints/lora.safetensors")
    trained.parent.mkdir(parents=True)
    trained.touch()
    assert parse_lora("run:0.5") == (trained, 0.5)
