"""Image to image: the published results, strength, batches."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.image import from_tensor, to_array
from ldm.inference import Pipeline, image_to_image
from ldm.inference.requests import ImageToImageRequest
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.samplers.base import Sampler
from ldm.models.diffusion.samplers.registry import SAMPLERS

TINY = {"height": 16, "width": 24, "steps": 5, "n_samples": 2, "scale": 3.0}


def generate(pipeline: Pipeline, image: Image.Image, prompts="a cat", **changes) -> list[np.ndarray]:
    results = image_to_image(
        pipeline, image, ImageToImageRequest(prompt=prompts, **{**TINY, **changes}), progress=False
    )
    return [np.asarray(p.image) for p in results]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("strength", [0.2, 0.75, 1.0])
def test_a_seed_gives_the_published_image(saved, pipeline, image, strength, eta):
    """The published order: seed, posterior, then for each batch the noise of the start and of the steps."""
    model, expected = saved.model, []
    torch.manual_seed(5)
    with torch.no_grad(), model.ema_scope():
        x = torch.from_numpy(to_array(image)).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
        z0 = model.get_first_stage_encoding(model.encode_first_stage(x))
        sampler = DDIMSampler(model)
        sampler.make_schedule(5, ddim_eta=eta, verbose=False)
        for _ in range(2):
            uncond, cond = model.get_learned_conditioning([""] * 2), model.get_learned_conditioning(["a cat"] * 2)
            z = sampler.stochastic_encode(z0, torch.tensor([int(strength * 5)] * 2))
            z = sampler.decode(z, cond, int(strength * 5), 3.0, uncond, verbose=False)
            expected += [np.asarray(from_tensor(x)) for x in model.decode_first_stage(z)]
    assert same(generate(pipeline, image, strength=strength, eta=eta, seed=5, n_iter=2), expected)


@pytest.mark.parametrize("steps", [1, 5, 20, 50])
def test_every_strength_works_with_every_number_of_steps(pipeline, image, steps, monkeypatch):
    steps_run = []
    monkeypatch.setattr(Sampler, "decode", lambda self, z, cond, t_start, *a, **k: steps_run.append(t_start) or z)
    strengths = [k / 20 for k in range(21)]
    for strength in strengths:
        generate(pipeline, image, strength=strength, steps=steps, n_samples=1)
    assert steps_run == [int(s * steps) for s in strengths if int(s * steps)]


def test_strength_0_is_the_first_stages_reconstruction(saved, pipeline, image):
    torch.manual_seed(42)
    with torch.no_grad():
        x = torch.from_numpy(to_array(image)).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
        z = saved.model.get_first_stage_encoding(saved.model.encode_first_stage(x))
        expected = [np.asarray(from_tensor(x)) for x in saved.model.decode_first_stage(z)]
    assert same(generate(pipeline, image, strength=0.0), expected)
    assert same(generate(pipeline, image, strength=0.19), expected)  # int(0.19 * 5) is 0
    assert len(list(image_to_image(pipeline, image, ImageToImageRequest(prompt="", **{**TINY, "strength": 0.0})))) == 2


def test_strength_1_ignores_the_image(pipeline, image):
    other = Image.fromarray(255 - np.asarray(image))
    assert same(generate(pipeline, image, strength=1.0), generate(pipeline, other, strength=1.0))
    assert not same(generate(pipeline, image, strength=0.6), generate(pipeline, other, strength=0.6))


def test_more_strength_moves_further_from_the_image(pipeline, image):
    start = generate(pipeline, image, strength=0.0, n_samples=1)[0].astype(float)
    moved = [np.abs(generate(pipeline, image, strength=s, n_samples=1)[0] - start).mean() for s in (0.2, 0.6, 1.0)]
    assert moved[0] < moved[1] < moved[2]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_starts_from_an_image(pipeline, image, name):
    other = Image.fromarray(255 - np.asarray(image))
    options = {"n_samples": 1, "sampler": name}
    assert same(
        generate(pipeline, image, strength=0.0, **options), generate(pipeline, image, strength=0.0, n_samples=1)
    )
    assert same(generate(pipeline, image, strength=1.0, **options), generate(pipeline, other, strength=1.0, **options))
    halves = generate(pipeline, image, strength=0.6, **options)
    assert not same(halves, generate(pipeline, other, strength=0.6, **options)) and same(
        halves, generate(pipeline, image, strength=0.6, **options)
    )


def test_fixed_code_starts_every_batch_from_the_same_noise(pipeline, image):
    a, b, c, d = generate(pipeline, image, fixed_code=True, n_iter=2)
    assert np.array_equal(a, c) and np.array_equal(b, d) and not np.array_equal(a, b)


def test_the_last_batch_of_prompts_may_be_smaller(pipeline, image):
    assert len(generate(pipeline, image, ["a", "b", "c"], n_iter=2)) == 6
