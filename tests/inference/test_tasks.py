"""Every task on the kind of first stage that the released models have."""

import copy

import numpy as np
import pytest
from PIL import Image

from ldm.inference import draw_samples, enlarge, fill, image_to_image, load_model, text_to_image
from ldm.inference.settings import Settings
from ldm.inference.task_settings import FillSettings, ImageSettings, SampleSettings, UpscaleSettings
from tests.tiny import FIRST_STAGE, save_model

VQ = copy.deepcopy(FIRST_STAGE)
VQ["target"] = "ldm.models.autoencoder.VQModelInterface"
VQ["params"]["n_embed"] = 32
VQ["params"]["ddconfig"]["double_z"] = False


@pytest.mark.parametrize("kind", ["unconditional", "class", "fill", "enlarge"])
def test_every_task_draws_with_a_vq_first_stage(tmp_path, kind):
    saved = save_model(tmp_path, kind, first_stage_config=VQ)
    pipeline = load_model(saved.config, saved.ckpt, "cpu", "full")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    if kind == "fill":
        mask = Image.new("L", image.size)
        mask.paste(255, (4, 4, 12, 12))
        drawn = [fill(pipeline, image, mask, FillSettings(steps=2), progress=False).image for _ in range(2)]
        kept = np.asarray(mask) == 0
        assert np.array_equal(np.asarray(drawn[0])[kept], np.asarray(image)[kept]) and drawn[0].size == (24, 16)
    elif kind == "enlarge":
        drawn = [enlarge(pipeline, image, UpscaleSettings(steps=2), progress=False).image for _ in range(2)]
        assert drawn[0].size == (96, 64)
    else:
        settings = SampleSettings(n_samples=1, steps=2, classes=None if kind == "unconditional" else (1,))
        drawn = [next(iter(draw_samples(pipeline, settings, progress=False))).image for _ in range(2)]
        assert drawn[0].size == (32, 32)
    assert np.array_equal(*map(np.asarray, drawn)) and np.ptp(np.asarray(drawn[0])) > 0


@pytest.mark.parametrize("kind", ["text", "class", "enlarge"])
def test_what_is_asked_of_the_sampler_changes_the_pictures(tmp_path, kind):
    saved = save_model(tmp_path, kind)
    pipeline = load_model(saved.config, saved.ckpt, "cpu", "full")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    size = {"height": 16, "width": 16, "n_samples": 1, "n_iter": 1}

    def draw(**changes) -> list[np.ndarray]:
        some = {"steps": 4, "sampler": "euler", **changes}
        if kind == "enlarge":
            drawn = [enlarge(pipeline, image, UpscaleSettings(**some), progress=False)]
        elif kind == "class":
            drawn = draw_samples(pipeline, SampleSettings(n_samples=1, scale=3.0, classes=(1,), **some), progress=False)
        else:
            drawn = [
                *text_to_image(pipeline, "a cat", Settings(**size, **some), progress=False),
                *image_to_image(pipeline, image, "a cat", ImageSettings(**size, **some), progress=False),
            ]
        return [np.asarray(picture.image) for picture in drawn]

    plain, asked = draw(), [{"sampler": "heun"}, {"spacing": "karras"}, {"dynamic_threshold": 0.5}]
    for changes in asked if kind == "enlarge" else [*asked, {"guidance_rescale": 0.7}]:
        assert all(not np.array_equal(a, b) for a, b in zip(draw(**changes), plain, strict=True)), changes
