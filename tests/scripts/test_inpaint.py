"""scripts/inpaint.py as a user runs it, on a model laid out as the published one."""

import shutil

import numpy as np
import pytest
from PIL import Image

from ldm.cli import run_command
from ldm.output.images import read_metadata
from ldm.output.watermark import Watermark
from ldm.paths import ROOT, fingerprint
from scripts.inpaint import main, parser
from tests.images import hole, make_image
from tests.scripts.refusals import help_without_heavy_imports, refused
from tests.tiny import SavedModel, save_model, save_text_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> SavedModel:
    return save_model(tmp_path_factory.mktemp("tiny"), "inpaint")


def pair(folder, stem: str = "x", width: int = 24, height: int = 16) -> None:
    folder.mkdir(exist_ok=True)
    make_image(width, height).save(folder / f"{stem}.png")
    hole(width, height).save(folder / f"{stem}_mask.png")


def arguments(saved: SavedModel, indir, outdir, *flags: str) -> list[str]:
    model = ["--config", str(saved.config), "--ckpt", str(saved.ckpt), "--device", "cpu"]
    return [*model, "--indir", str(indir), "--outdir", str(outdir), "--steps", "3", *flags]


def test_the_watermark_is_in_the_generated_pixels_only(saved, tmp_path):
    pair(tmp_path / "in", width=264, height=264)
    run_command(main, arguments(saved, tmp_path / "in", tmp_path / "out", "--steps", "1"))
    info = read_metadata(tmp_path / "out" / "x.png")
    assert info["watermark"] == f"{Watermark()}, in the generated pixels only"
    mask, result = hole(264, 264), np.asarray(Image.open(tmp_path / "out" / "x.png"))
    kept = np.asarray(mask) < 128
    assert np.array_equal(result[kept], np.asarray(make_image(264, 264))[kept])


def test_every_pair_gives_a_file_of_its_name_and_none_is_overwritten(saved, tmp_path, capsys):
    for stem in ("a", "b_mask_c"):
        pair(tmp_path / "in", stem)
    Image.new("RGB", (4, 4)).save(tmp_path / "in" / "alone.png")
    make_image().save(tmp_path / "in" / "photo.jpg")
    hole().save(tmp_path / "in" / "photo_mask.png")
    for _ in range(2):
        assert run_command(main, arguments(saved, tmp_path / "in", tmp_path / "out")) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(f"{stem}{k}.png" for stem in ("a", "b_mask_c", "photo") for k in ("", "-1"))
    one, two = (np.asarray(Image.open(tmp_path / "out" / name)) for name in ("a.png", "a-1.png"))
    assert np.array_equal(one, two) and "3 images in" in capsys.readouterr().out
    info = read_metadata(tmp_path / "out" / "a.png")
    expected = {
        "task": "inpaint",
        "steps": 3,
        "eta": 0.0,
        "seed": 42,
        "mask": str(tmp_path / "in" / "a_mask.png"),
        "width": 24,
    }
    assert {key: info[key] for key in expected} == expected and info["ckpt"] == str(saved.ckpt)
    assert all(
        info[f"{name}_fingerprint"] == fingerprint(info[name]) for name in ("ckpt", "config", "init_img", "mask")
    )


def test_results_in_the_folder_of_the_images_leave_them_alone(saved, tmp_path):
    pair(tmp_path)
    before = (tmp_path / "x.png").read_bytes()
    run_command(main, arguments(saved, tmp_path, tmp_path))
    assert (tmp_path / "x.png").read_bytes() == before and (tmp_path / "x-1.png").exists()


def test_a_mask_of_0_and_1_gives_the_image_of_0_and_255_and_a_black_one_is_refused(saved, tmp_path, capsys):
    pair(tmp_path / "in", "a")
    pair(tmp_path / "in", "b")
    binary = (np.asarray(hole()) >= 128).astype(np.uint8)
    Image.fromarray(binary).save(tmp_path / "in" / "b_mask.png")
    assert run_command(main, arguments(saved, tmp_path / "in", tmp_path / "out")) == 0
    a, b = (np.asarray(Image.open(tmp_path / "out" / f"{name}.png")) for name in "ab")
    assert np.array_equal(a, b) and not np.array_equal(a, np.asarray(make_image()))
    capsys.readouterr()
    Image.fromarray(0 * binary).save(tmp_path / "in" / "b_mask.png")
    line = refused(main, arguments(saved, tmp_path / "in", tmp_path / "new"), capsys)
    assert "b_mask.png: its largest value is 0" in line and not (tmp_path / "new").exists()


def test_a_second_mask_on_the_command_line_is_warned_about(caplog):
    assert parser().parse_args(["--mask", "a.png", "--mask", "b.png"]).mask == "b.png"
    assert [record.message for record in caplog.records] == ["--mask is given twice: b.png is used, not a.png"]


@pytest.mark.parametrize("name", ["last.ckpt", "model.ckpt"])
def test_the_released_model_is_found_under_either_name(saved, tmp_path, monkeypatch, name):
    folder = tmp_path / "models" / "ldm" / "inpainting_big"
    folder.mkdir(parents=True)
    shutil.copy(saved.config, folder / "config.yaml")
    shutil.copy(saved.ckpt, folder / name)
    pair(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    assert run_command(main, ["--indir", "in", "--outdir", "out", "--steps", "1", "--device", "cpu"]) == 0
    assert read_metadata("out/x.png")["ckpt"] == f"models/ldm/inpainting_big/{name}"


def test_without_the_released_weights_the_defaults_say_how_to_get_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair(tmp_path / "in")
    if not any((ROOT / "models/ldm/inpainting_big").glob("*.ckpt")):
        line = refused(main, ["--indir", "in", "--outdir", "out"], capsys)
        assert "models/ldm/inpainting_big/last.ckpt" in line and "download_models.sh inpainting_big" in line


def test_flags_have_the_published_defaults():
    opt = vars(parser().parse_args([]))
    published = {
        "steps": 50,
        "config": "models/ldm/inpainting_big/config.yaml",
        "ckpt": "models/ldm/inpainting_big/last.ckpt",
    }
    assert {name: opt[name] for name in published} == published


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--indir", ""], "--indir '': expected a path"),
        (["--indir", "nowhere"], "--indir nowhere: no such folder"),
        (["--steps", "0"], "--steps 0: choose 1 to 100"),
        (["--ddim_eta", "-1"], "--ddim_eta -1.0"),
        (["--ckpt", "nowhere.ckpt"], "checkpoint nowhere.ckpt: no such file"),
        (["--step", "3"], "did you mean --steps?"),
    ],
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(saved, tmp_path, flags, words, capsys, monkeypatch):
    monkeypatch.setattr("ldm.inference.load_model", None)
    pair(tmp_path / "in")
    assert words in refused(main, arguments(saved, tmp_path / "in", tmp_path / "out", *flags), capsys)
    assert not (tmp_path / "out").exists()


def test_unmatched_images_and_masks_are_refused_by_name(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ldm.inference.load_model", None)
    command = arguments(saved, tmp_path, tmp_path / "out")
    assert "no x_mask.png found" in refused(main, command, capsys)
    hole().save(tmp_path / "x_mask.png")
    assert "is missing" in refused(main, command, capsys)
    make_image(25).save(tmp_path / "x.png")
    assert "x_mask.png has 24x16 pixels" in refused(main, command, capsys)
    (tmp_path / "x.png").write_bytes(b"")
    assert "x.png: empty file" in refused(main, command, capsys)


def test_a_text_model_inpaints_by_blending_and_says_that_an_inpainting_model_is_better(tmp_path, caplog):
    text = save_text_model(tmp_path)
    pair(tmp_path / "in")
    with caplog.at_level("INFO"):
        assert run_command(main, arguments(text, tmp_path / "in", tmp_path / "out", "--prompt", "a cat")) == 0
    assert "an inpainting model (9 input channels) is better" in caplog.text
    info = read_metadata(tmp_path / "out" / "x.png")
    assert (info["task"], info["prompt"], info["scale"]) == ("inpaint", "a cat", 7.5)


def test_a_model_of_another_kind_is_refused(tmp_path, capsys):
    other = save_model(tmp_path, "upscale")
    words = "not an inpainting model: expected"
    assert words in refused(main, arguments(other, tmp_path, tmp_path / "out"), capsys)


def test_help_is_quick_and_works_anywhere(tmp_path):
    assert "--indir" in help_without_heavy_imports(ROOT / "scripts" / "inpaint.py", tmp_path)
