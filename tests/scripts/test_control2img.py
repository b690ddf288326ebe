"""scripts/control2img.py as a user runs it."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli import run_command
from ldm.output.images import read_metadata
from ldm.paths import ROOT
from scripts.control2img import main
from tests.scripts.refusals import help_without_heavy_imports, refused
from tests.tiny import save_model


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A file of `control_model.*` alone."""
    folder = tmp_path_factory.mktemp("control")
    state = save_model(folder, "control").model.state_dict()
    weights = {name: tensor for name, tensor in state.items() if name.startswith("control_model.")}
    torch.save(weights, folder / "control.pth")
    return folder / "control.pth"


@pytest.fixture
def arguments(net, tmp_path, tmp_path_factory, image):
    saved = save_model(tmp_path_factory.mktemp("base"), "text", use_ema=False)
    image.resize((48, 32)).save(tmp_path / "a.png")
    flags = f"--config {saved.config} --ckpt {saved.ckpt} --device cpu --precision full --ddim_steps 3 --resolution 16"
    return [*flags.split(), "--controlnet", str(net), "--control-image", str(tmp_path / "a.png"), "--prompt", "a cat"]


def test_images_under_several_controls_record_their_settings_and_are_repeated_from_them(arguments, net, tmp_path):
    second = ["--controlnet", str(net), "--control-image", str(tmp_path / "a.png"), "--detector", "canny"]
    flags = [
        *second,
        "--detector",
        "none",
        "--canny",
        "50",
        "90",
        "--control-scale",
        "0.5",
        "--n_samples",
        "2",
        "--guess",
    ]
    assert run_command(main, [*arguments, *flags, "--outdir", str(tmp_path / "one")]) == 0
    one = tmp_path / "one" / "samples" / "00001.png"
    info = read_metadata(one)
    expected = {"task": "control2img", "control_scale": [0.5, 0.5], "detector": ["canny", "none"], "canny": [50, 90]}
    expected |= {"controlnet": [str(net)] * 2, "guess": True, "height": 16, "width": 24}
    assert {key: info[key] for key in expected} == expected
    assert len(list((tmp_path / "one" / "controls").glob("*.png"))) == 2
    assert run_command(main, ["--from-metadata", str(one), "--outdir", str(tmp_path / "two")]) == 0
    again = tmp_path / "two" / "samples" / "00000.png"
    assert read_metadata(again) == info
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(one)))


def test_a_control_image_that_changed_is_refused(arguments, tmp_path, capsys):
    assert run_command(main, [*arguments, "--outdir", str(tmp_path / "one")]) == 0
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    capsys.readouterr()
    words = refused(main, ["--from-metadata", str(tmp_path / "one" / "samples" / "00000.png")], capsys)
    assert "a.png" in words and "control" in words


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--control-image", "b.png"], "--control-image is given 2 times, for 1 ControlNets: pass one for each"),
        (["--detector", "edges"], "--detector edges: choose one of none, canny, depth"),
        (["--canny", "1", "2"], "--canny: only for --detector canny"),
        (["--depth-model", "."], "--depth-model: only for --detector depth"),
        (["--detector", "canny", "--canny", "3", "2"], "--canny 3 2: choose 0 <= LOW <= HIGH; 100 200 is usual"),
        (["--control-scale", "nan"], "--control-scale nan"),
        (["--guess", "--scale", "1"], "--guess with --scale 1"),
    ],
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(arguments, tmp_path, flags, words, capsys, monkeypatch):
    monkeypatch.setattr("ldm.inference.load_model", None)
    assert words in refused(main, [*arguments, *flags, "--outdir", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_help_is_quick_and_works_anywhere(tmp_path):
    assert "--control-image" in help_without_heavy_imports(ROOT / "scripts" / "control2img.py", tmp_path)
