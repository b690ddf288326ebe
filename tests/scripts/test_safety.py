"""--safety and --watermark in every sampling script: flagged images, saved images, refusals before loading."""

import importlib

import numpy as np
import pytest
from PIL import Image

from ldm.cli import run_command
from ldm.output.images import read_metadata
from tests.output.toys import save_checker
from tests.scripts.refusals import refused
from tests.tiny import SavedModel, save_model

EVERYTHING, NOTHING = -2.0, 2.0  # thresholds of a cosine
KIND_OF = {
    "txt2img": "text",
    "img2img": "text",
    "inpaint": "inpaint",
    "upscale": "upscale",
    "sample_diffusion": "unconditional",
}


@pytest.fixture(scope="module")
def checkers(tmp_path_factory):
    """Folders of a checker that flags everything and of one that flags nothing."""
    folder = tmp_path_factory.mktemp("checkers")
    return {flags: save_checker(folder / str(flags), EVERYTHING if flags else NOTHING) for flags in (True, False)}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, SavedModel]:
    """A model for each script; config.yaml, so that sample_diffusion finds it."""
    saved = {kind: save_model(tmp_path_factory.mktemp(kind), kind, timesteps=20) for kind in set(KIND_OF.values())}
    return {
        kind: model._replace(config=model.config.rename(model.config.with_name("config.yaml")))
        for kind, model in saved.items()
    }


def command(script: str, models, folder, *flags: str) -> list[str]:
    """A quick command line that writes images to folder/out."""
    model, out, given = models[KIND_OF[script]], str(folder / "out"), folder / "given"
    given.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(given / "x.png")
    Image.new("L", (16, 16), 255).save(given / "x_mask.png")
    files = ["--config", str(model.config), "--ckpt", str(model.ckpt), "--outdir", out]
    prompt = [*files, "--ddim_steps", "2", "--n_samples", "2", "--n_iter", "1"]
    words = {
        "txt2img": [*prompt, "--H", "16", "--W", "16"],
        "img2img": [*prompt, "--init-img", str(given / "x.png")],
        "inpaint": [*files, "--steps", "2", "--indir", str(given)],
        "upscale": [*files, "--steps", "2", "--init-img", str(given / "x.png")],
        "sample_diffusion": ["-r", str(model.ckpt), "-l", out, "-n", "2", "-c", "2"],
    }
    return [*words[script], "--device", "cpu", "--precision", "full", *flags]


def main_of(script: str):
    return importlib.import_module(f"scripts.{script}").main


def written(folder) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted((folder / "out").rglob("*.png"))}


@pytest.mark.parametrize("script", KIND_OF)
def test_on_writes_black_images_in_the_place_of_flagged_ones(models, checkers, tmp_path, script):
    assert (
        run_command(
            main_of(script),
            command(script, models, tmp_path, "--safety", "on", "--safety_checker", str(checkers[True])),
        )
        == 0
    )
    generated_images = written(tmp_path)
    assert generated_images and not any(pixels.any() for pixels in generated_images.values())
    for array in (tmp_path / "out").rglob("*.npz"):
        assert not np.load(array)["arr_0"].any()
    infos = [read_metadata(path) for path in (tmp_path / "out").rglob("*.png")]
    assert all((info["safety"], info["flagged"], info["watermark"]) == ("on", True, None) for info in infos)


@pytest.mark.parametrize("script", KIND_OF)
def test_report_and_what_is_not_flagged_change_no_pixel(models, checkers, tmp_path, script, caplog):
    states = [("off", None, []), ("report", True, ["--safety_checker", str(checkers[True])])]
    states.append(("on", False, ["--safety_checker", str(checkers[False])]))
    results = []
    for mode, flagged, flags in states:
        folder = tmp_path / mode
        folder.mkdir()
        assert (
            run_command(main_of(script), command(script, models, folder, "--safety", mode, *flags, *seed_of(script)))
            == 0
        )
        infos = [read_metadata(path) for path in (folder / "out").rglob("*.png")]
        assert infos and all((info["safety"], info["flagged"]) == (mode, flagged) for info in infos)
        results.append(written(folder))
    for other in results[1:]:
        assert other.keys() == results[0].keys() and all(
            np.array_equal(other[name], results[0][name]) for name in other
        )
    assert "it is saved with flagged: true" in caplog.text


def seed_of(script: str) -> list[str]:
    return ["--seed", "3"] if script == "sample_diffusion" else []  # its default is another one every time


def test_a_grid_is_made_of_checked_images_and_is_not_checked_itself(models, checkers, tmp_path, monkeypatch):
    """Of two images the second is flagged: the grid has a black square there and is not checked itself."""
    from ldm.output.safety_checker import SafetyChecker

    seen = []
    monkeypatch.setattr(SafetyChecker, "flags", lambda self, image: bool(seen.append(image.size) or len(seen) > 2))
    flags = [
        "--safety",
        "on",
        "--safety_checker",
        str(checkers[False]),
    ]  # the first look is the checker's own, when it is made
    assert run_command(main_of("txt2img"), command("txt2img", models, tmp_path, *flags)) == 0
    generated_images = written(tmp_path)
    grid = generated_images["grid-0000.png"]
    assert (
        np.array_equal(grid[2:18, 2:18], generated_images["00000.png"])
        and not grid[:, 19:].any()
        and generated_images["00000.png"].any()
    )
    info = read_metadata(tmp_path / "out" / "grid-0000.png")
    assert (info["safety"], info["flagged"], len(seen)) == ("on", True, 3)


@pytest.mark.parametrize("script", [*KIND_OF, "knn2img"])
def test_a_checker_that_cannot_run_stops_every_script_before_it_loads_anything(
    models, tmp_path, script, capsys, monkeypatch
):
    module = importlib.import_module(f"scripts.{script}")
    monkeypatch.setattr("ldm.inference.load_model", None)
    if script == "knn2img":
        monkeypatch.setattr("ldm.inference.requests.RetrievalRequest._require_model", lambda self, info: None)
        words = command("txt2img", models, tmp_path)
    else:
        words = command(script, models, tmp_path)
    err = refused(module.main, [*words, "--safety", "report", "--safety_checker", str(tmp_path / "nowhere")], capsys)
    assert f"--safety report: --safety_checker {tmp_path / 'nowhere'}: no such folder; put config.json" in err
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    assert 'pip install -e ".[safety]"' in refused(module.main, [*words, "--safety", "on"], capsys)
    assert not (tmp_path / "out").exists()


def test_the_configs_word_is_the_default(models, checkers, tmp_path, capsys):
    config = tmp_path / "checked.yaml"
    config.write_text("safety: on\n" + models["text"].config.read_text(encoding="utf-8"), encoding="utf-8")
    words = [*command("txt2img", models, tmp_path), "--config", str(config)]
    assert run_command(main_of("txt2img"), [*words, "--safety_checker", str(checkers[True])]) == 0
    assert read_metadata(tmp_path / "out" / "samples" / "00000.png")["flagged"] is True
    assert run_command(main_of("txt2img"), [*words, "--safety", "off"]) == 0
    assert read_metadata(tmp_path / "out" / "samples" / "00002.png")["safety"] == "off"
    capsys.readouterr()
    words += ["--safety", "off", "--safety_checker", "x"]
    assert "--safety_checker x with --safety off: add --safety on" in refused(main_of("txt2img"), words, capsys)


@pytest.mark.parametrize(
    "method, text", [(None, "dwtDct, 136 bits"), ("dwtDctSvd", "dwtDctSvd, 136 bits"), ("off", None)]
)
def test_samples_and_grids_carry_the_watermark_that_is_asked_for(models, tmp_path, method, text, monkeypatch):
    monkeypatch.setattr("ldm.output.watermark.MIN_PIXELS", 0)  # the images are tiny
    assert (
        run_command(
            main_of("txt2img"),
            command("txt2img", models, tmp_path, *([] if method is None else ["--watermark", method])),
        )
        == 0
    )
    for path in (tmp_path / "out").rglob("*.png"):
        assert read_metadata(path)["watermark"] == (text and f"StableDiffusionV1, {text}")
