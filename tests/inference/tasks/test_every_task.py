"""Every task on the kind of first stage that the released models have."""

import copy

import numpy as np
import pytest
from PIL import Image

from ldm.inference import generate_samples, image_to_image, inpaint, load_model, text_to_image, upscale
from ldm.inference.requests import (
    ClassConditionalRequest,
    ImageToImageRequest,
    InpaintRequest,
    TextToImageRequest,
    UpscaleRequest,
)
from tests.tiny import FIRST_STAGE, save_model

VQ = copy.deepcopy(FIRST_STAGE)
VQ["target"] = "ldm.models.autoencoder.VQModelInterface"
VQ["params"]["n_embed"] = 32
VQ["params"]["ddconfig"]["double_z"] = False


@pytest.mark.parametrize("kind", ["unconditional", "class", "inpaint", "upscale"])
def test_every_task_generates_with_a_vq_first_stage(tmp_path, kind):
    saved = save_model(tmp_path, kind, first_stage_config=VQ)
    pipeline = load_model(saved.config, saved.ckpt, "cpu", "full")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    if kind == "inpaint":
        mask = Image.new("L", image.size)
        mask.paste(255, (4, 4, 12, 12))
        results = [inpaint(pipeline, image, mask, InpaintRequest(steps=2), progress=False).image for _ in range(2)]
        kept = np.asarray(mask) == 0
        assert np.array_equal(np.asarray(results[0])[kept], np.asarray(image)[kept]) and results[0].size == (24, 16)
    elif kind == "upscale":
        results = [upscale(pipeline, image, UpscaleRequest(steps=2), progress=False).image for _ in range(2)]
        assert results[0].size == (96, 64)
    else:
        settings = ClassConditionalRequest(n_samples=1, steps=2, classes=None if kind == "unconditional" else (1,))
        results = [next(iter(generate_samples(pipeline, settings, progress=False))).image for _ in range(2)]
        assert results[0].size == (32, 32)
    assert np.array_equal(*map(np.asarray, results)) and np.ptp(np.asarray(results[0])) > 0


@pytest.mark.parametrize("kind", ["text", "class", "upscale", "inpaint"])
def test_sampler_options_change_the_images(tmp_path, kind):
    saved = save_model(tmp_path, kind)
    pipeline = load_model(saved.config, saved.ckpt, "cpu", "full")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    size = {"height": 16, "width": 16, "n_samples": 1, "n_iter": 1}

    def generate(**changes) -> list[np.ndarray]:
        options = {"steps": 4, "sampler": "euler", **changes}
        if kind == "upscale":
            results = [upscale(pipeline, image, UpscaleRequest(tile=0, **options), progress=False)]
        elif kind == "inpaint":
            hole = Image.new("L", image.size, 255)
            results = [inpaint(pipeline, image, hole, InpaintRequest(**options), progress=False)]
        elif kind == "class":
            results = generate_samples(
                pipeline, ClassConditionalRequest(n_samples=1, scale=3.0, classes=(1,), **options), progress=False
            )
        else:
            results = [
                *text_to_image(pipeline, TextToImageRequest(prompt="a cat", **size, **options), progress=False),
                *image_to_image(
                    pipeline, image, ImageToImageRequest(prompt="a cat", **size, **options), progress=False
                ),
            ]
        return [np.asarray(generated.image) for generated in results]

    plain, asked = generate(), [{"sampler": "heun"}, {"spacing": "karras"}, {"dynamic_threshold": 0.5}]
    asked.append({"deep_cache": 2})
    for changes in asked if kind in ("upscale", "inpaint") else [*asked, {"guidance_rescale": 0.7}]:
        assert all(not np.array_equal(a, b) for a, b in zip(generate(**changes), plain, strict=True)), changes
