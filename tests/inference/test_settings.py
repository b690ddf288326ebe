"""Checks that all requests share, without torch."""

import subprocess
import sys

import pytest

from ldm.config.model_info import model_info
from ldm.inference.requests import ImageToImageRequest, TextToImageRequest
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
