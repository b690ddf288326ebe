"""scripts/upscale.py as a user runs it, on a model laid out as the published one."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli import run_command
from ldm.data.image import from_tensor, to_array
from ldm.inference import Pipeline, load_model, upscale
from ldm.inference.requests import UpscaleRequest
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.output.images import read_metadata
from ldm.paths import ROOT, fingerprint
from scripts.upscale import main, parser
from tests.scripts.refusals import help_without_heavy_imports, refused
from tests.tiny import SavedModel, save_model, save_text_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> SavedModel:
    return save_model(tmp_path_factory.mktemp("tiny"), "upscale")


@pytest.fixture(scope="module")
def pipeline(saved) -> Pipeline:
    return load_model(saved.config, saved.ckpt, device="cpu", precision="full")


def picture(width: int = 6, height: int = 4, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def arguments(saved: SavedModel, image, outdir, *flags: str) -> list[str]:
    model = ["--config", str(saved.config), "--ckpt", str(saved.ckpt), "--device", "cpu"]
    return [*model, "--init-img", str(image), "--outdir", str(outdir), "--steps", "3", *flags]


def test_the_network_sees_the_small_picture_beside_a_latent_of_its_size(saved, pipeline):
    torch.manual_seed(7)
    small = torch.from_numpy(to_array(picture())).permute(2, 0, 1)[None]
    with torch.no_grad(), saved.model.ema_scope():
        z, _ = DDIMSampler(saved.model).sample(
            S=3, batch_size=1, shape=(4, 4, 6), conditioning=small, eta=1.0, verbose=False
        )
        expected = from_tensor(saved.model.decode_first_stage(z)[0])
    result = upscale(pipeline, picture(), UpscaleRequest(steps=3, seed=7), progress=False).image
    assert result.size == (24, 16) and np.array_equal(np.asarray(result), np.asarray(expected))


@pytest.mark.parametrize("width, height", [(6, 4), (7, 5), (1, 3)])
def test_any_size_becomes_four_times_that(pipeline, width, height):
    result = upscale(pipeline, picture(width, height), UpscaleRequest(steps=1), progress=False)
    assert result.image.size == (4 * width, 4 * height) == (result.info["width"], result.info["height"])


def test_the_network_sees_no_more_than_a_tile_and_what_fits_is_drawn_in_one_piece(pipeline, monkeypatch):
    def draw(**changes) -> np.ndarray:
        return np.asarray(
            upscale(pipeline, picture(22, 13), UpscaleRequest(**{"steps": 2, **changes}), progress=False).image
        )

    whole, seen, apply_model = draw(tile=0), set(), pipeline.model.apply_model
    assert np.array_equal(draw(tile=22), whole) and whole.shape == (52, 88, 3)
    monkeypatch.setattr(
        pipeline.model, "apply_model", lambda x, *rest: seen.add(tuple(x.shape[-2:])) or apply_model(x, *rest)
    )
    tiled = draw(tile=8)
    assert seen == {(8, 8)} and tiled.shape == whole.shape and not np.array_equal(tiled, whole)


def test_a_picture_does_not_depend_on_those_before_it_and_none_is_overwritten(saved, tmp_path, capsys):
    for k in range(2):
        picture(seed=k).save(tmp_path / f"{k}.png")
    command = arguments(saved, tmp_path / "0.png", tmp_path / "out")
    command[command.index("--init-img") + 1 : command.index("--outdir")] = [
        str(tmp_path / "0.png"),
        str(tmp_path / "1.png"),
    ]
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
    picture().save(tmp_path / "x.png")
    assert words in refused(main, arguments(saved, tmp_path / "x.png", tmp_path / "out", *flags), capsys)
    assert not (tmp_path / "out").exists()
    assert "--init-img: pass the images" in refused(main, [], capsys)


def test_a_model_of_another_kind_is_refused(tmp_path, capsys):
    text = save_text_model(tmp_path)
    assert "not an upscaling model" in refused(main, arguments(text, "x.png", tmp_path / "out"), capsys)


def test_help_is_quick_and_works_anywhere(tmp_path):
    assert "--init-img" in help_without_heavy_imports(ROOT / "scripts" / "upscale.py", tmp_path)
