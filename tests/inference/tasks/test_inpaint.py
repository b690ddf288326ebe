"""Inpainting: the published results, unchanged pixels, feathering."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.inference import Pipeline, inpaint, load_model
from ldm.inference.requests import InpaintRequest
from ldm.models.diffusion.ddim import DDIMSampler
from tests.images import hole, make_image
from tests.tiny import SavedModel, save_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> SavedModel:
    return save_model(tmp_path_factory.mktemp("tiny"), "inpaint")


@pytest.fixture(scope="module")
def pipeline(saved) -> Pipeline:
    return load_model(saved.config, saved.ckpt, device="cpu", precision="full")


def test_the_result_is_the_published_one(saved, pipeline):
    """Condition: the latent of the image with a black hole, and the mask as -1 and 1 at the latent's size."""
    image, model = np.asarray(make_image()) / 255.0, saved.model
    mask = (np.asarray(hole())[:, :, None] / 255.0 >= 0.5).astype(np.float64)

    def batch(array) -> torch.Tensor:
        return torch.from_numpy(2.0 * array - 1.0).float().permute(2, 0, 1)[None]

    torch.manual_seed(7)
    with torch.no_grad(), model.ema_scope():
        c = model.cond_stage_model.encode(batch((1 - mask) * image)).mode()
        cc = torch.nn.functional.interpolate(batch(mask), size=c.shape[-2:])
        cond = torch.cat([c, cc], dim=1)
        z, _ = DDIMSampler(model).sample(S=3, batch_size=1, shape=(4, *c.shape[-2:]), conditioning=cond, verbose=False)
        predicted = ((model.decode_first_stage(z).clamp(-1, 1) + 1) / 2)[0].permute(1, 2, 0).numpy()
    expected = (1 - mask) * image + mask * predicted
    result = np.asarray(inpaint(pipeline, make_image(), hole(), InpaintRequest(steps=3, seed=7), progress=False).image)
    assert np.abs(result - 255 * expected).max() <= 0.51
    assert np.abs(result - np.asarray(make_image()).astype(int)).max() > 20


@pytest.mark.parametrize("width, height", [(24, 16), (16, 9), (29, 17), (12, 3)])
def test_unmasked_pixels_are_unchanged_at_any_size(pipeline, width, height):
    image, mask = make_image(width, height), hole(width, height)
    result = inpaint(pipeline, image, mask, InpaintRequest(steps=2), progress=False).image
    kept = np.asarray(mask) < 128
    assert result.size == (width, height) and np.array_equal(np.asarray(result)[kept], np.asarray(image)[kept])


def test_the_masked_pixels_have_no_influence(pipeline):
    image, mask = make_image(), hole()
    other = np.asarray(image).copy()
    other[np.asarray(mask) >= 128] = 77
    results = [
        inpaint(pipeline, x, mask, InpaintRequest(steps=2), progress=False).image
        for x in (image, Image.fromarray(other))
    ]
    assert np.array_equal(*map(np.asarray, results))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> SavedModel:
    return save_model(tmp_path_factory.mktemp("tiny"), "text")


def test_a_text_model_blends_the_noised_image_in_as_the_samplers_do(text):
    """Latent cells with a pixel of the hole are generated, those without keep the image's latent."""
    pipeline, model = load_model(text.config, text.ckpt, device="cpu", precision="full"), text.model
    request = InpaintRequest(steps=3, seed=7, prompt="a cat")
    result = np.asarray(inpaint(pipeline, make_image(), hole(), request, progress=False).image)
    keep = torch.ones(1, 1, 4, 6)
    keep[:, :, :3, 1:5] = 0.0  # rows 3 to 9 and columns 5 to 16, four pixels in a cell
    torch.manual_seed(7)
    with torch.no_grad(), model.ema_scope():
        x = torch.from_numpy(np.array(make_image())).permute(2, 0, 1)[None] / 127.5 - 1.0
        x0 = model.get_first_stage_encoding(model.encode_first_stage(x))
        options = {"mask": keep, "x0": x0, "unconditional_guidance_scale": 7.5, "verbose": False}
        options["unconditional_conditioning"] = model.get_learned_conditioning([""])
        cond = model.get_learned_conditioning(["a cat"])
        z, _ = DDIMSampler(model).sample(S=3, batch_size=1, shape=(4, 4, 6), conditioning=cond, **options)
        expected = ((model.decode_first_stage(z).clamp(-1, 1) + 1) * 127.5)[0].permute(1, 2, 0).numpy()
    inside = np.asarray(hole()) >= 128
    assert np.abs(result[inside] - expected[inside]).max() <= 0.51
    assert np.array_equal(result[~inside], np.asarray(make_image())[~inside])


@pytest.mark.parametrize("sampler", ["plms", "ancestral", "dpm_solver", "euler_ancestral"])
@pytest.mark.parametrize("width, height", [(24, 16), (29, 17)])
def test_a_text_model_inpaints_at_any_size_with_every_sampler(text, sampler, width, height):
    pipeline = load_model(text.config, text.ckpt, device="cpu", precision="full")
    image, mask, request = make_image(width, height), hole(width, height), InpaintRequest(steps=2, sampler=sampler)
    result, inside = np.asarray(inpaint(pipeline, image, mask, request, progress=False).image), np.asarray(mask) >= 128
    assert np.array_equal(result[~inside], np.asarray(image)[~inside])
    assert not np.array_equal(result[inside], np.asarray(image)[inside])
