"""scripts/edit.py as a user runs it."""

import numpy as np
import pytest
from PIL import Image

from ldm.cli import run_command
from ldm.output.images import read_metadata
from ldm.paths import ROOT
from scripts.edit import main
from tests.scripts.refusals import help_without_heavy_imports, refused
from tests.tiny import model_flags, save_model


@pytest.fixture(scope="module")
def edit_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("edit"), "edit")


@pytest.fixture
def arguments(edit_model, image, tmp_path):
    image.resize((64, 64)).save(tmp_path / "a.png")
    given = ["--init-img", str(tmp_path / "a.png"), "--prompt", "make it winter", "--ddim_steps", "3"]
    return [*model_flags(edit_model), *given]


def test_an_edit_records_its_settings_and_is_repeated_from_them(arguments, tmp_path):
    scales = ["--scale", "5", "--image-scale", "2", "--n_samples", "2", "--resolution", "16"]
    assert run_command(main, [*arguments, *scales, "--outdir", str(tmp_path / "one")]) == 0
    second = tmp_path / "one" / "samples" / "00001.png"
    info = read_metadata(second)
    expected = {"task": "edit", "prompt": "make it winter", "scale": 5.0, "image_scale": 2.0, "height": 16, "width": 16}
    expected |= {"init_img": str(tmp_path / "a.png"), "resolution": 16}
    assert {key: info[key] for key in expected} == expected and Image.open(second).size == (16, 16)
    assert run_command(main, ["--from-metadata", str(second), "--outdir", str(tmp_path / "two")]) == 0
    again = tmp_path / "two" / "samples" / "00000.png"
    assert read_metadata(again) == info
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(second)))
    changed = ["--from-metadata", str(second), "--image-scale", "1", "--outdir", str(tmp_path / "three")]
    assert run_command(main, changed) == 0
    assert read_metadata(tmp_path / "three" / "samples" / "00000.png")["image_scale"] == 1.0


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--init-img", ""], "--init-img '': expected a path"),
        (["--init-img", "nowhere.png"], "nowhere.png: no such file"),
        (["--prompt", ""], '--prompt: pass an instruction, e.g. --prompt "make it winter"'),
        (["--image-scale", "nan"], "--image-scale nan: choose -1000 to 1000; 1.5 is usual"),
        (["--image-scale", "-1001"], "--image-scale -1001"),
        (["--resolution", "0"], "--resolution 0: choose 1 to"),
        (["--image_scale", "2"], "did you mean --image-scale?"),
        (["--ckpt", "nowhere.ckpt"], "checkpoint nowhere.ckpt: no such file"),
        (["--config", "configs/stable-diffusion/v1-inference.yaml"], "not an edit model: expected a text encoder"),
        (["--config", "configs/stable-diffusion/v1-inpainting-inference.yaml"], "or use scripts/inpaint.py"),
    ],
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(arguments, tmp_path, flags, words, capsys, monkeypatch):
    monkeypatch.setattr("ldm.inference.load_model", None)
    assert words in refused(main, [*arguments, *flags, "--outdir", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_a_missing_image_is_asked_for(capsys):
    assert "--init-img: pass the image to edit, e.g. --init-img photo.png" in refused(main, ["--prompt", "a"], capsys)


def test_help_is_quick_and_works_anywhere(tmp_path):
    assert "--image-scale" in help_without_heavy_imports(ROOT / "scripts" / "edit.py", tmp_path)
