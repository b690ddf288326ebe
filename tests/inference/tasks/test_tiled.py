"""`--tiled`: the first stage sees only tiles, the network the whole latent, and the image hardly changes."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.inference import Pipeline, image_to_image, load_model, text_to_image
from ldm.inference.requests import ImageToImageRequest, TextToImageRequest
from ldm.inference.tasks.text_to_image import in_tiles
from tests.tiny import save_text_model

WIDE = {"height": 64, "width": 96, "steps": 2, "n_samples": 1, "n_iter": 1, "scale": 2.0}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Pipeline:
    saved = save_text_model(tmp_path_factory.mktemp("tiny"))
    return load_model(saved.config, saved.ckpt, device="cpu", precision="full")


def generate(pipeline: Pipeline, **changes) -> np.ndarray:
    (generated,) = text_to_image(pipeline, TextToImageRequest(prompt="a cat", **{**WIDE, **changes}), progress=False)
    assert generated.info["tiled"] == changes.get("tiled", 0)
    return np.asarray(generated.image)


def from_image(pipeline: Pipeline, image: Image.Image, **changes) -> np.ndarray:
    (generated,) = image_to_image(
        pipeline, image, ImageToImageRequest(prompt="a cat", **{**WIDE, **changes}), progress=False
    )
    return np.asarray(generated.image)


def watch(monkeypatch, model, name: str) -> set:
    """The heights and widths that a method of the model is called with from now on."""
    seen, inner = set(), getattr(model, name)
    monkeypatch.setattr(model, name, lambda x, *rest, **more: seen.add(tuple(x.shape[-2:])) or inner(x, *rest, **more))
    return seen


def test_the_first_stage_sees_a_tile_and_the_network_the_whole(pipeline, monkeypatch):
    names = ("decode_first_stage", "encode_first_stage", "apply_model")
    decoded, encoded, denoised = (watch(monkeypatch, pipeline.model, name) for name in names)
    assert generate(pipeline, tiled=32).shape == (64, 96, 3)
    assert decoded == {(8, 8)} and denoised == {(16, 24)} and not encoded
    assert from_image(pipeline, Image.new("RGB", (96, 64), "red"), tiled=32).shape == (64, 96, 3)
    assert encoded == {(32, 32)} and decoded == {(8, 8)} and denoised == {(16, 24)}


@pytest.mark.parametrize("tiled", [96, 128])
def test_a_tile_that_holds_it_all_changes_nothing(pipeline, tiled):
    assert np.array_equal(generate(pipeline, tiled=tiled), generate(pipeline))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    assert np.array_equal(from_image(pipeline, image, tiled=tiled), from_image(pipeline, image))


@pytest.mark.parametrize("height, width", [(8, 8), (72, 8), (40, 104)])
def test_any_size_that_the_network_takes_is_decoded(pipeline, height, width):
    assert generate(pipeline, height=height, width=width, tiled=16).shape == (height, width, 3)


@pytest.mark.parametrize("side", [4, 12, 18, -16])
def test_tiles_that_are_too_small_or_cut_cells_are_refused(pipeline, side):
    with pytest.raises(ValueError, match=f"--tiled {side}: choose a multiple of 4 pixels, at least 16; 512 is usual"):
        generate(pipeline, tiled=side)


def test_seams_do_not_show(pipeline):
    """A first stage normalizes over its input, so tiles may differ in tone: by less than 5 % of the range on average,
    and the difference changes no more across a tile's edge than elsewhere."""
    z = torch.randn(1, 4, 24, 40, generator=torch.Generator().manual_seed(0))
    tiled = in_tiles(pipeline, TextToImageRequest(height=96, width=160, tiled=64, factor=4))
    with pipeline.sampling():
        difference = (tiled.decode(z) - pipeline.decode(z)) / 2  # of the range
    assert 0 < difference.abs().mean() < 0.05
    change = difference.diff(dim=-1).abs().mean(dim=(0, 1, 2))  # (159,)
    edges = [4 * cell - 1 for cell in (8, 16, 24, 32)]  # tiles of 16 cells start and end at every 8th
    assert change[edges].mean() < 1.2 * change.mean()
