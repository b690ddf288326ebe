"""Edits of an image by instructions."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.image import from_tensor
from ldm.inference import EditRequest, edit, load_model
from ldm.models.diffusion.ddim import DDIMSampler
from tests.tiny import save_model

TINY = {"height": 16, "width": 24, "steps": 3}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    saved = save_model(tmp_path_factory.mktemp("edit"), "edit")
    return load_model(saved.config, saved.ckpt, "cpu", "full")


def generate(pipeline, image, prompt="make it thick", only=None, **changes) -> list[np.ndarray]:
    request = EditRequest(prompt=prompt, **{**TINY, **changes})
    return [np.asarray(generated.image) for generated in edit(pipeline, image, request, progress=False, only=only)]


@pytest.mark.parametrize("scale, image_scale", [(7.5, 1.5), (1.0, 2.0), (4.0, 1.0)])
def test_an_edit_is_sampled_under_the_instruction_and_the_image_with_both_scales(pipeline, image, scale, image_scale):
    model = pipeline.model
    with torch.no_grad():
        latent = model.encode_first_stage(pipeline.tensor(image)).mode()
        text, none = model.get_learned_conditioning(["make it thick"]), model.get_learned_conditioning([""])
        cond, uncond = (
            {"c_concat": [x], "c_crossattn": [c]}
            for x, c in ((latent, text), (latent if image_scale == 1.0 else 0 * latent, none))
        )
        scales = {"unconditional_guidance_scale": scale, "image_guidance_scale": image_scale}
        torch.manual_seed(42)
        z, _ = DDIMSampler(model).sample(
            3, 1, (4, 4, 6), cond, unconditional_conditioning=uncond, verbose=False, **scales
        )
        expected = np.asarray(from_tensor(pipeline.decode(z)[0]))
    (edited,) = generate(pipeline, image, scale=scale, image_scale=image_scale)
    assert np.array_equal(edited, expected)


def test_the_image_the_instruction_and_both_scales_change_the_edit(pipeline, image):
    plain = generate(pipeline, image)
    others = [
        generate(pipeline, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        generate(pipeline, image, "make it thin"),
        generate(pipeline, image, scale=3.0),
        generate(pipeline, image, image_scale=3.0),
    ]
    assert not any(np.array_equal(plain, other) for other in others)
    assert np.array_equal(plain, generate(pipeline, image))


@pytest.mark.parametrize("mode", ["batch", "image"])
def test_an_edit_alone_equals_that_of_the_whole_run(pipeline, image, mode):
    options = {"prompt": ["a", "b", "c"], "n_samples": 2, "seed_mode": mode, "sampler": "euler_ancestral"}
    (one,) = generate(pipeline, image, only=2, **options)
    whole = generate(pipeline, image, **options)
    assert len(whole) == 3 and np.abs(one.astype(int) - whole[2]).max() <= 1
