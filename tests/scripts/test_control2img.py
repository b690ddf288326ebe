"""scripts/control2img.py as a user runs it."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli import run_command
from ldm.data.detectors import canny_edges
from ldm.output.images import png_info, read_metadata
from ldm.paths import ROOT
from scripts import txt2img
from scripts.control2img import main
from tests.scripts.refusals import help_without_heavy_imports, refused
from tests.tiny import model_flags, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("control"), "control")


@pytest.fixture
def control(model, tmp_path):
    state = model.model.state_dict()
    torch.save({k: v for k, v in state.items() if k.startswith("control_model.")}, tmp_path / "control.pth")
    return str(tmp_path / "control.pth")


@pytest.fixture
def arguments(model, image, tmp_path):
    image.resize((48, 32)).save(tmp_path / "a.png")
    given = ["--control-image", str(tmp_path / "a.png"), "--prompt", "a cat", "--resolution", "16", "--ddim_steps", "3"]
    return [*model_flags(model), *given]


def test_an_image_records_its_controls_and_is_repeated_from_them(arguments, control, tmp_path, capsys):
    two = ["--controlnet", control, "--control-image", str(tmp_path / "a.png"), "--n_samples", "2", "--guess"]
    two += ["--detector", "canny", "--detector", "none", "--control-scale", "0.5", "--canny", "20", "60"]
    assert run_command(main, [*arguments, *two, "--outdir", str(tmp_path / "one")]) == 0
    second = tmp_path / "one" / "samples" / "00001.png"
    info = read_metadata(second)
    expected = {"task": "control2img", "prompt": "a cat", "height": 16, "width": 24, "guess": True}
    expected |= {"control_scale": [0.5, 0.5], "detector": ["canny", "none"], "canny": [20, 60], "resolution": 16}
    expected |= {"controlnet": [control], "control_image": [str(tmp_path / "a.png")] * 2}
    assert {key: info[key] for key in expected} == expected and Image.open(second).size == (24, 16)
    seen = [Image.open(tmp_path / "one" / "controls" / f"0000{k}.png") for k in range(2)]
    small = Image.open(tmp_path / "a.png").resize((24, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(seen[0], canny_edges(small, 20, 60)) and np.array_equal(seen[1], small)
    assert "controls/00000.png" in capsys.readouterr().out.replace("\\", "/")

    assert run_command(main, ["--from-metadata", str(second), "--outdir", str(tmp_path / "two")]) == 0
    again = tmp_path / "two" / "samples" / "00000.png"
    assert read_metadata(again) == info
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(second)))
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    capsys.readouterr()
    words = refused(main, ["--from-metadata", str(second), "--outdir", str(tmp_path / "three")], capsys)
    assert "--control-image" in words and "not the file that" in words


@pytest.mark.parametrize("flags", [[], ["--use_ema"], ["--no-use_ema"]])
def test_the_choice_of_averages_reaches_a_controlnet_and_is_repeated(arguments, control, tmp_path, flags):
    """Without a flag a file's averages are used if it has any, whatever the config of the base says."""
    weights = torch.load(control, weights_only=True)
    averages = {name: 0.5 * tensor for name, tensor in weights.items()}
    shadows = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in averages.items()}
    torch.save({**weights, **shadows}, tmp_path / "both.pth")
    torch.save(weights if flags == ["--no-use_ema"] else averages, tmp_path / "chosen.pth")
    images = []
    for name, chosen in (("both", flags), ("chosen", [])):
        argv = ["--controlnet", str(tmp_path / f"{name}.pth"), "--control-image", str(tmp_path / "a.png"), *chosen]
        assert run_command(main, [*arguments, *argv, "--n_samples", "1", "--outdir", str(tmp_path / name)]) == 0
        images.append(tmp_path / name / "samples" / "00000.png")
    again = ["--from-metadata", str(images[0]), "--outdir", str(tmp_path / "again")]
    assert run_command(main, again) == 0
    images.append(tmp_path / "again" / "samples" / "00000.png")
    first, *others = (np.asarray(Image.open(path)) for path in images)
    assert all(np.array_equal(first, other) for other in others)
    assert read_metadata(images[2]) == read_metadata(images[0])


def test_metadata_of_another_form_are_refused(arguments, tmp_path, capsys):
    assert run_command(main, [*arguments, "--outdir", str(tmp_path / "one")]) == 0
    info = read_metadata(tmp_path / "one" / "samples" / "00000.png")
    capsys.readouterr()
    for name, value in (("controlnet", "x.pth"), ("control_scale", ["1"]), ("canny", 3), ("guess", [True])):
        Image.new("RGB", (8, 8)).save(tmp_path / "bad.png", pnginfo=png_info({**info, name: value}))
        assert f"invalid {name} in the metadata" in refused(
            main, ["--from-metadata", str(tmp_path / "bad.png")], capsys
        )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--control-image", "nowhere.png"], "is given 2 times, for 1 ControlNets, that of the model included"),
        (["--controlnet", "nowhere.pth"], "is given 1 times, for 2 ControlNets"),
        (["--controlnet", "nowhere.pth", "--control-image", "a.png"], "--controlnet nowhere.pth: no such file"),
        (["--detector", "sobel"], "--detector sobel: choose one of none, canny, depth"),
        (["--detector", "depth"], "--detector depth; pass --depth-model DIR with transformers' DPT"),
        (["--detector", "depth", "--depth-model", "x"], "--depth-model x: no config.json in it"),
        (["--detector", "canny", "--detector", "none"], "--detector is given 2 times, for 1 controls"),
        (["--control-scale", "1", "--control-scale", "1"], "--control-scale is given 2 times, for 1 controls"),
        (["--control-scale", "inf"], "--control-scale inf: choose 0 (no control)"),
        (["--detector", "canny", "--canny", "200", "100"], "--canny 200 100: choose 0 <= LOW <= HIGH"),
        (["--canny", "1", "2"], "--canny: only for --detector canny"),
        (["--depth-model", "."], "--depth-model: only for --detector depth"),
        (["--guess", "--scale", "1"], "--guess with --scale 1"),
        (["--resolution", "0"], "--resolution 0: choose 1 to"),
        (["--config", "configs/stable-diffusion/v1-inference.yaml"], "--controlnet: pass the weights of a ControlNet"),
        (["--ckpt", "nowhere.ckpt"], "checkpoint nowhere.ckpt: no such file"),
    ],
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(arguments, tmp_path, flags, words, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.inference.load_model", None)
    assert words in refused(main, [*arguments, *flags, "--outdir", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_kind_is_named_with_its_script(tmp_path, image, control, capsys):
    image.resize((64, 64)).save(tmp_path / "a.png")
    flags = ["--controlnet", control, "--control-image", str(tmp_path / "a.png")]
    flags += ["--config", "configs/stable-diffusion/v1-inpainting-inference.yaml"]
    assert "use scripts/inpaint.py" in refused(main, flags, capsys)


def test_help_is_quick_and_works_anywhere(tmp_path):
    assert "--control-scale" in help_without_heavy_imports(ROOT / "scripts" / "control2img.py", tmp_path)


def test_a_controlnet_that_a_script_does_not_use_is_named(model, tmp_path, capsys, caplog):
    given = [*model_flags(model), "--prompt", "a cat", "--H", "16", "--W", "16", "--outdir", str(tmp_path / "out")]
    assert run_command(txt2img.main, [*given, "--ddim_steps", "1", "--n_samples", "1", "--n_iter", "1"]) == 0
    assert "has a ControlNet, which is not used here; control2img.py uses it" in caplog.text + capsys.readouterr().err
