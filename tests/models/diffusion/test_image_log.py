"""Laws of the image logs of diffusion models."""

import pytest
import torch

from ldm.models.diffusion.image_log import tile_frames
from tests.models.diffusion.tiny import ATTEND, CLASSES, batch, latent_diffusion, unet

PIXELS = {"target": "ldm.models.autoencoder.IdentityFirstStage"}


@pytest.fixture(scope="module")
def model():
    """A class-conditional model of 8x8 pixels."""
    changes = {"unet_config": unet(in_channels=3, out_channels=3, **ATTEND), "channels": 3, "scale_factor": 1.0}
    options = {"first_stage_config": PIXELS, "cond_stage_key": "class_label", "log_every_t": 10, "timesteps": 30}
    return latent_diffusion("crossattn", {}, CLASSES, **options, **changes).eval()


@pytest.fixture(scope="module")
def data():
    small = batch()
    return {**small, "image": small["image"][:, ::4, ::4]}


def test_inpainting_keeps_the_surroundings_of_the_hole_and_outpainting_the_hole(model, data):
    keys = ["inputs", "mask", "samples_inpainting", "samples_outpainting"]
    log = model.log_images(data, N=2, ddim_steps=10, ddim_eta=0.0, inpaint=True, return_keys=keys)
    assert sorted(log["mask"].unique().tolist()) == [-1, 1]
    kept = (log["mask"] > 0).expand_as(log["inputs"])  # white: outside the hole
    for name, same, other in (("samples_inpainting", kept, ~kept), ("samples_outpainting", ~kept, kept)):
        change = (log[name] - log["inputs"]).abs()
        assert change[same].mean() < 0.2 * change[other].mean(), name


def test_return_keys_select_images_and_unknown_ones_are_refused(model, data):
    assert list(model.log_images(data, N=2, sample=False, return_keys=["inputs"])) == ["inputs"]
    with pytest.raises(ValueError, match=r"return_keys \['sampels'\]: this model logs inputs, reconstruction"):
        model.log_images(data, N=2, sample=False, return_keys=["sampels"])


def test_every_option_has_its_image(model, data):
    options = {"plot_progressive_rows": True, "unconditional_guidance_scale": 2.0, "n_row": 1}
    log = model.log_images(data, N=2, ddim_steps=None, **options)
    rows = {"diffusion_row": 6, "denoise_row": 5, "progressive_row": 5}
    assert set(log) == {"inputs", "reconstruction", "conditioning", "samples", "samples_cfg_scale_2.00", *rows}
    assert all(log[name].shape == (1, 3, 8, 8 * frames) for name, frames in rows.items())
    assert not torch.equal(log["samples"], log["samples_cfg_scale_2.00"])


def test_logs_go_through_the_hook_that_downstream_models_override(model, data, monkeypatch):
    seen, published = [], model.get_input
    monkeypatch.setattr(model, "get_input", lambda *a, **kwargs: seen.append(kwargs["bs"]) or published(*a, **kwargs))
    model.log_images(data, N=2, sample=False)
    assert seen == [2]


def test_frames_are_tiled_with_a_row_for_each_sample():
    frames = [torch.full((2, 3, 4, 4), float(step)) for step in range(5)]
    frames[0][1] = 7.0
    image = tile_frames(frames)
    assert image.shape == (1, 3, 8, 20) and (image[0, :, :4, :4] == 0).all() and (image[0, :, 4:, :4] == 7).all()
    assert (image[..., 16:] == 4).all()
