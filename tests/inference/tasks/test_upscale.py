"""Upscaling: the published results, any size, tiles."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config.model_info import model_info
from ldm.data.image import from_tensor, to_array
from ldm.inference import Pipeline, load_model, upscale
from ldm.inference.requests import UpscaleRequest
from ldm.models.diffusion.ddim import DDIMSampler
from tests.tiny import KINDS, SavedModel, save_model, text_model_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> SavedModel:
    return save_model(tmp_path_factory.mktemp("tiny"), "upscale")


@pytest.fixture(scope="module")
def pipeline(saved) -> Pipeline:
    return load_model(saved.config, saved.ckpt, device="cpu", precision="full")


def make_image(width: int = 6, height: int = 4, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_the_low_resolution_image_is_concatenated_with_the_latent(saved, pipeline):
    torch.manual_seed(7)
    small = torch.from_numpy(to_array(make_image())).permute(2, 0, 1)[None]
    with torch.no_grad(), saved.model.ema_scope():
        z, _ = DDIMSampler(saved.model).sample(
            S=3, batch_size=1, shape=(4, 4, 6), conditioning=small, eta=1.0, verbose=False
        )
        expected = from_tensor(saved.model.decode_first_stage(z)[0])
    result = upscale(pipeline, make_image(), UpscaleRequest(steps=3, seed=7), progress=False).image
    assert result.size == (24, 16) and np.array_equal(np.asarray(result), np.asarray(expected))


@pytest.mark.parametrize("width, height", [(6, 4), (7, 5), (1, 3)])
def test_any_size_becomes_four_times_that(pipeline, width, height):
    result = upscale(pipeline, make_image(width, height), UpscaleRequest(steps=1), progress=False)
    assert result.image.size == (4 * width, 4 * height) == (result.info["width"], result.info["height"])


def test_large_images_are_upscaled_in_tiles(pipeline, monkeypatch):
    def generate(**changes) -> np.ndarray:
        return np.asarray(
            upscale(pipeline, make_image(22, 13), UpscaleRequest(**{"steps": 2, **changes}), progress=False).image
        )

    whole, seen, apply_model = generate(tile=0), set(), pipeline.model.apply_model
    assert np.array_equal(generate(tile=22), whole) and whole.shape == (52, 88, 3)
    monkeypatch.setattr(
        pipeline.model, "apply_model", lambda x, *rest: seen.add(tuple(x.shape[-2:])) or apply_model(x, *rest)
    )
    tiled = generate(tile=8)
    assert seen == {(8, 8)} and tiled.shape == whole.shape and not np.array_equal(tiled, whole)


def rescaling(folder, **params) -> Pipeline:
    target = "ldm.modules.encoders.modules.SpatialRescaler"
    saved = save_model(folder, "upscale", cond_stage_config={"target": target, "params": params})
    return load_model(saved.config, saved.ckpt, device="cpu", precision="full")


@pytest.mark.parametrize("method", ["bilinear", "nearest", "area"])
def test_a_rescaler_that_shrinks_originals_to_the_latents_size_sees_the_image(tmp_path, pipeline, method):
    """Trained to enlarge four times what it returns, it gives what a model without a rescaler gives."""
    result = upscale(
        rescaling(tmp_path, n_stages=2, method=method), make_image(), UpscaleRequest(steps=2), progress=False
    )
    same = upscale(pipeline, make_image(), UpscaleRequest(steps=2), progress=False)
    assert result.image.size == (24, 16)
    assert np.abs(np.asarray(result.image).astype(int) - np.asarray(same.image)).max() <= 1


@pytest.mark.parametrize("tile", [0, 8])
def test_a_rescaler_that_halves_the_image_gives_half_the_enlargement(tmp_path, tile):
    request = UpscaleRequest(steps=1, tile=tile)
    for width, height in ((12, 8), (9, 5)):
        result = upscale(rescaling(tmp_path, n_stages=1), make_image(width, height), request, progress=False)
        assert result.image.size == (2 * width, 2 * height)


def test_a_rescaler_of_segmentation_maps_is_no_upscaler(tmp_path):
    target = "ldm.modules.encoders.modules.SpatialRescaler"
    params = {"n_stages": 2, "in_channels": 182, "out_channels": 3}
    config = text_model_config(**KINDS["upscale"] | {"cond_stage_config": {"target": target, "params": params}})
    with pytest.raises(ValueError, match=r"not an upscaling model: .* use scripts/sample_conditional\.py"):
        UpscaleRequest().checked(model_info(config))
