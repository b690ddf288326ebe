"""scripts/img2img.py as a user runs it."""

import pytest
from PIL import Image

from ldm.cli import run_command
from ldm.output.images import read_metadata
from ldm.paths import ROOT
from scripts.img2img import main, parser
from tests.scripts.refusals import help_without_heavy_imports, refused
from tests.tiny import SavedModel, model_flags


def arguments(saved: SavedModel, image_file, outdir, *flags: str) -> list[str]:
    return [*model_flags(saved, outdir), "--init-img", str(image_file), "--ddim_steps", "3", *flags]


def test_an_image_of_any_size_is_resized_to_the_nearest_that_the_model_takes_in_one_line(
    saved, tmp_path, caplog, capsys
):
    Image.new("RGB", (37, 20), "red").save(tmp_path / "a.jpg")
    with caplog.at_level("INFO"):
        assert run_command(main, arguments(saved, tmp_path / "a.jpg", tmp_path, "--n_iter", "2")) == 0
    assert sum("resized from 37x20 to 40x16 pixels" in r.message for r in caplog.records) == 1
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert written == ["grid-0000.png", *(f"samples/0000{k}.png" for k in range(4))]
    assert Image.open(tmp_path / "samples" / "00000.png").size == (40, 16)
    info = read_metadata(tmp_path / "samples" / "00003.png")
    expected = {
        "task": "img2img",
        "init_img": str(tmp_path / "a.jpg"),
        "strength": 0.75,
        "scale": 5.0,
        "height": 16,
        "width": 40,
    }
    assert {key: info[key] for key in expected} == expected and "4 images in" in capsys.readouterr().out
    run_command(main, arguments(saved, tmp_path / "a.jpg", tmp_path))
    assert len(list((tmp_path / "samples").iterdir())) == 6


@pytest.mark.parametrize(
    ("size", "words"),
    [((1, 1), "a.png: 1x1 pixels; this model needs at least 4x4"), ((5, 5), "8x8 pixels are too few for this model")],
)
def test_an_image_that_is_too_small_is_refused_with_sizes_in_pixels(saved, tmp_path, capfd, size, words):
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert (
        run_command(main, arguments(saved, tmp_path / "a.png", tmp_path / "out", "--n_samples", "1", "--scale", "1"))
        == 2
    )
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and words in line and line.endswith(("8x8 is the nearest", "16x8"))


def test_flags_have_the_published_defaults():
    opt = vars(parser().parse_args([]))
    published = {
        "prompt": "a painting of a virus monster playing guitar",
        "ddim_steps": 50,
        "ddim_eta": None,
        "n_iter": 1,
        "n_samples": 2,
    }
    published |= {
        "n_rows": 0,
        "scale": 5.0,
        "strength": 0.75,
        "seed": 42,
        "precision": "auto",
        "outdir": "outputs/img2img-samples",
    }
    published |= {
        "config": "configs/stable-diffusion/v1-inference.yaml",
        "ckpt": "models/ldm/stable-diffusion-v1/model.ckpt",
    }
    flags = ("plms", "fixed_code", "skip_grid", "skip_save")
    assert {name: opt[name] for name in published} == published and not any(opt[name] for name in flags)
    assert not {"H", "W", "dpm_solver", "laion400m"} & opt.keys()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--plms"], "--plms: not supported by img2img"),
        (["--init-img", ""], "--init-img '': expected a path"),
        (["--init-img", "nowhere.png"], "nowhere.png: no such file"),
        (["--strength", "1.5"], "--strength 1.5: choose 0"),
        (["--strength", "nan"], "--strength nan"),
        (["--ddim_steps", "101"], "--ddim_steps 101: choose 1 to 100"),
        (["--n_samples", "0"], "--n_samples 0"),
        (["--sampler", "pmls"], "--sampler pmls: choose one of ddim, plms"),
        (["--ckpt", "nowhere.ckpt"], "checkpoint nowhere.ckpt: no such file"),
        (["--init_img", "a.png"], "did you mean --init-img?"),
        (["--H", "512"], "unknown flag --H"),
    ],
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(saved, tmp_path, flags, words, capsys, monkeypatch):
    monkeypatch.setattr("ldm.inference.load_model", None)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    assert words in refused(main, arguments(saved, tmp_path / "a.png", tmp_path / "out", *flags), capsys)
    assert not (tmp_path / "out").exists()


def test_help_is_quick_and_works_anywhere(tmp_path):
    assert "--strength" in help_without_heavy_imports(ROOT / "scripts" / "img2img.py", tmp_path)
