"""Text to image: published noise, batches of prompts, metadata."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.image import from_tensor
from ldm.inference import Pipeline, text_to_image
from ldm.inference.requests import TextToImageRequest
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler

TINY = {"height": 16, "width": 24, "steps": 3, "n_samples": 2, "n_iter": 1, "scale": 3.0}


def generate(pipeline: Pipeline, prompts="a cat", **changes) -> list[np.ndarray]:
    return [
        np.asarray(p.image)
        for p in text_to_image(pipeline, TextToImageRequest(prompt=prompts, **{**TINY, **changes}), progress=False)
    ]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("name, cls", [("ddim", DDIMSampler), ("plms", PLMSSampler), ("dpm_solver", DPMSolverSampler)])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_a_seed_gives_the_published_noise(saved, pipeline, name, cls, scale):
    """The published order: seed, then for each batch the sampler's random numbers and no others."""
    model = saved.model
    expected = []
    torch.manual_seed(5)
    with torch.no_grad(), model.ema_scope():
        for _ in range(2):
            uncond = model.get_learned_conditioning([""] * 2) if scale != 1.0 else None
            cond = model.get_learned_conditioning(["a cat"] * 2)
            z, _ = cls(model).sample(
                S=3,
                batch_size=2,
                shape=(4, 4, 6),
                conditioning=cond,
                unconditional_guidance_scale=scale,
                unconditional_conditioning=uncond,
                verbose=False,
            )
            expected += [np.asarray(from_tensor(x)) for x in model.decode_first_stage(z)]
    assert same(generate(pipeline, sampler=name, scale=scale, seed=5, n_iter=2), expected)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
def test_the_same_seed_gives_the_same_images_and_another_seed_others(pipeline, sampler):
    first = generate(pipeline, sampler=sampler)
    assert same(first, generate(pipeline, sampler=sampler)) and not same(
        first, generate(pipeline, sampler=sampler, seed=43)
    )
    assert not np.array_equal(first[0], first[1])


def test_the_random_state_of_the_caller_and_of_the_run_are_independent(pipeline):
    undisturbed = generate(pipeline, n_iter=2, eta=1.0)
    torch.manual_seed(99)
    expected = torch.randn(6)
    torch.manual_seed(99)
    numbers, images = [], []
    for generated in text_to_image(
        pipeline, TextToImageRequest(prompt="a cat", **{**TINY, "n_iter": 2, "eta": 1.0}), progress=False
    ):
        numbers.append(torch.randn(1))
        images.append(np.asarray(generated.image))
    assert same(images, undisturbed) and torch.equal(torch.cat(numbers), expected[:4])


def test_fixed_code_starts_every_batch_from_the_same_noise(pipeline):
    a, b, c, d = generate(pipeline, fixed_code=True, n_iter=2)
    assert np.array_equal(a, c) and np.array_equal(b, d) and not np.array_equal(a, b)
    three = generate(pipeline, ["a cat"] * 3, fixed_code=True)
    assert (
        same(three, [a, b, a]) or np.abs(np.stack(three).astype(int) - np.stack([a, b, a])).max() <= 1
    )  # a batch of one


@pytest.mark.parametrize("n_prompts", [1, 2, 3, 5])
def test_every_prompt_of_a_list_is_generated_n_iter_times_in_order(pipeline, n_prompts):
    prompts = [f"a cat number {k}" for k in range(n_prompts)]
    images = list(text_to_image(pipeline, TextToImageRequest(prompt=prompts, **{**TINY, "n_iter": 2}), progress=False))
    assert [p.info["prompt"] for p in images] == prompts * 2
    assert [p.info["image_index"] for p in images] == list(range(2 * n_prompts))
    assert all(
        p.info["batch_size"] == len([q for q in images if q.info["batch_index"] == p.info["batch_index"]])
        for p in images
    )


def test_prompts_negative_prompts_and_guidance_matter(pipeline):
    base = generate(pipeline)
    assert not same(base, generate(pipeline, "a dog")) and not same(base, generate(pipeline, scale=1.0))
    assert not same(base, generate(pipeline, negative_prompt="blurry")) and same(
        base, generate(pipeline, negative_prompt="")
    )


def test_encode_replaces_the_models_text_encoder(pipeline):
    seen = []

    def encode(prompts):
        seen.append(list(prompts))
        return pipeline.encode_prompts(["a dog"] * len(prompts), "", guided=True)

    request = TextToImageRequest(prompt="a cat", **TINY)
    images = list(text_to_image(pipeline, request, progress=False, encode=encode))
    assert same([np.asarray(p.image) for p in images], generate(pipeline, "a dog")) and seen == [["a cat"] * 2]
    assert (images[0].info["task"], images[0].info["prompt"]) == ("txt2img", "a cat")


def test_the_metadata_suffice_to_repeat_an_image(saved, pipeline):
    prompts, changes = ["a", "b", "c"], {"negative_prompt": "blurry", "seed": 7, "n_iter": 2}
    images = list(text_to_image(pipeline, TextToImageRequest(prompt=prompts, **{**TINY, **changes}), progress=False))
    info = images[4].info
    again = TextToImageRequest(**{field.name: info[field.name] for field in fields(TextToImageRequest)})
    again = replace(again, prompt=[images[k].info["prompt"] for k in range(info["n_prompts"])])
    repeated = list(text_to_image(pipeline, again, progress=False))
    assert np.array_equal(np.asarray(repeated[info["image_index"]].image), np.asarray(images[4].image))
    assert info["ckpt_bytes"] == saved.ckpt.stat().st_size and info["config"] == str(saved.config) and info["version"]
    assert info["latent_shape"] if "latent_shape" in info else (info["channels"], info["factor"]) == (4, 4)


def test_images_have_the_requested_size(pipeline):
    (image,) = generate(pipeline, n_samples=1, height=40, width=8)
    assert image.shape == (40, 8, 3) and image.dtype == np.uint8
    assert isinstance(
        next(iter(text_to_image(pipeline, TextToImageRequest(prompt="", **TINY), progress=False))).image, Image.Image
    )
