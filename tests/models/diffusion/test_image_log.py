"""Laws of the image logs of diffusion models."""

import pytest
import torch

from ldm.models.diffusion.image_log import tile_frames
from ldm.visualize import labels_to_rgb
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


def test_conditions_are_shown_as_the_network_sees_them():
    """A SpatialRescaler's input and a concatenated image are shown at the latent's size, not in full."""
    rescaler = {"target": "ldm.modules.encoders.modules.SpatialRescaler", "params": {"n_stages": 2}}
    small = latent_diffusion("concat", {"in_channels": 10}, rescaler, cond_stage_key="image", concat_keys=["image"])
    log = small.eval().log_images(batch(), N=2, sample=False)
    seen = torch.nn.functional.interpolate(log["inputs"], scale_factor=0.25)
    assert torch.equal(log["conditioning"], small.cond_stage_model(log["inputs"]))
    assert torch.equal(log["conditioning_image"], seen) and log["inputs"].shape[2:] == (32, 32)


def test_a_segmentation_map_is_shown_in_colors_at_the_size_that_the_network_sees():
    params = {"n_stages": 2, "in_channels": 5, "out_channels": 3}
    rescaler = {"target": "ldm.modules.encoders.modules.SpatialRescaler", "params": params}
    model = latent_diffusion("concat", {"in_channels": 7}, rescaler, cond_stage_key="map").eval()
    maps = torch.nn.functional.one_hot(torch.arange(2 * 32 * 32).reshape(2, 32, 32) // 300 % 5, 5).float()
    shown = model.log_images({**batch(), "map": maps}, N=2, sample=False)["conditioning"]
    assert shown.shape == (2, 3, 8, 8) and torch.equal(
        shown, labels_to_rgb(model.cond_stage_model.rescale(maps.permute(0, 3, 1, 2)))
    )
