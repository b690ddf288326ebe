"""scripts/upscale.py as a user runs it, on a model laid out as the published one."""

import numpy as np
import pytest
from PIL import Image

from ldm.cli import run_command
from ldm.output.images import read_metadata
from ldm.paths import ROOT, fingerprint
from scripts.upscale import main, parser
from tests.scripts.refusals import help_without_heavy_imports, refused
from tests.tiny import SavedModel, save_model, save_text_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> SavedModel:
    return save_model(tmp_path_factory.mktemp("tiny"), "upscale")


def make_image(width: int = 6, height: int = 4, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def arguments(saved: SavedModel, image, outdir, *flags: str) -> list[str]:
    model = ["--config", str(saved.config), "--ckpt", str(saved.ckpt), "--device", "cpu"]
    return [*model, "--init-img", str(image), "--outdir", str(outdir), "--steps", "3", *flags]


def test_an_image_does_not_depend_on_those_before_it_and_none_is_overwritten(saved, tmp_path, capsys):
    for k in range(2):
        make_image(seed=k).save(tmp_path / f"{k}.png")
    command = [*arguments(saved, tmp_path / "0.png", tmp_path / "out"), "--init-img", str(tmp_path / "1.png")]
    assert run_command(main, command) == 0 and "2 images in" in capsys.readouterr().out
    assert run_command(main, arguments(saved, tmp_path / "1.png", tmp_path / "out")) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "1-1.png", "1.png"]
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / "out" / name)) for name in ("1.png", "1-1.png")))
    info = read_metadata(tmp_path / "out" / "1.png")
    expected = {
        "task": "upscale",
        "steps": 3,
        "eta": 1.0,
        "seed": 42,
        "width": 24,
        "height": 16,
        "init_img": str(tmp_path / "1.png"),
    }
    assert {key: info[key] for key in expected} == expected and info["init_img_fingerprint"] == fingerprint(
        tmp_path / "1.png"
    )


def test_the_defaults_are_the_released_models():
    opt = vars(parser().parse_args([]))
    expected = {"steps": None, "ddim_eta": None, "tile": 128}  # 100 and 1.0: test_task_settings
    expected |= {"config": "models/ldm/bsr_sr/config.yaml", "ckpt": "models/ldm/bsr_sr/model.ckpt"}
    assert {name: opt[name] for name in expected} == expected


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--init-img", "nowhere.png"], "nowhere.png: no such file"),
        (["--steps", "101"], "--steps 101: choose 1 to 100"),
        (["--ckpt", "nowhere.ckpt"], "checkpoint nowhere.ckpt: no such file"),
        (["--sampler", "plms", "--ddim_eta", "1"], "--ddim_eta 1: plms is deterministic"),
        (["--tile", "3"], "--tile 3: choose a multiple of 2 pixels, at least 4, or 0"),
        (["--tiles"], "unknown flag --tiles; did you mean --tile?"),
    ],
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(saved, tmp_path, flags, words, capsys, monkeypatch):
    monkeypatch.setattr("ldm.inference.load_model", None)
    make_image().save(tmp_path / "x.png")
    assert words in refused(main, arguments(saved, tmp_path / "x.png", tmp_path / "out", *flags), capsys)
    assert not (tmp_path / "out").exists()
    assert "--init-img: pass the images" in refused(main, [], capsys)


def test_a_model_of_another_kind_is_refused(tmp_path, capsys):
    text = save_text_model(tmp_path)
    assert "not an upscaling model" in refused(main, arguments(text, "x.png", tmp_path / "out"), capsys)


def test_help_is_quick_and_works_anywhere(tmp_path):
    assert "--init-img" in help_without_heavy_imports(ROOT / "scripts" / "upscale.py", tmp_path)
