"""Pictures from prompts: from noise, or from a picture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ldm.inference.pipeline import Pipeline
from ldm.inference.randomness import Randomness
from ldm.pictures import Picture
from ldm.settings import Settings, batches_of, check_takes_text
from ldm.task_settings import ImageSettings

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

logger = logging.getLogger(__name__)


Encode = Callable[[Sequence[str]], tuple[Any, Any]]
"""A batch of prompts -> (condition, what guidance leads away from; None without guidance)."""


def text_to_image(
    pipeline: Pipeline,
    prompts: str | Sequence[str],
    settings: Settings,
    progress: bool = True,
    encode: Encode | None = None,
    task: str = "txt2img",
) -> Iterator[Picture]:
    """Draw `settings.n_iter` times: `n_samples` pictures of the one prompt, or one of each prompt of a list, `n_samples` at a time.

    Noise is drawn as published (first the fixed code, then batch after batch), so that a seed gives the published picture.
    encode: makes conditions of prompts where the model's own condition stage does not (retrieval-augmented models).
    task: the name of it all in the metadata.
    """
    import torch

    settings = settings.checked(pipeline.facts)
    if encode is None:
        encode = _own_encoder(pipeline, settings)
    shape, sampler, randomness = settings.latent_shape, pipeline.sampler(settings.sampler), Randomness(settings.seed, pipeline.device)
    start = None
    if settings.fixed_code:
        with randomness():
            start = torch.randn((settings.n_samples, *shape), device=pipeline.device)

    def draw(batch_size: int, cond: Tensor, uncond: Tensor | None, tick: Callable[[int], None]) -> Tensor:
        z, _ = sampler.sample(
            S=settings.steps,
            batch_size=batch_size,
            shape=shape,
            conditioning=cond,
            eta=settings.eta,
            x_T=start[:batch_size] if start is not None else None,
            unconditional_guidance_scale=settings.scale,
            unconditional_conditioning=uncond,
            callback=tick,
            log_every_t=settings.steps + 1,
            verbose=False,
        )
        return z

    yield from _drawn(task, pipeline, prompts, settings, settings.steps, encode, draw, randomness, progress)


def image_to_image(
    pipeline: Pipeline, image: Image.Image, prompts: str | Sequence[str], settings: ImageSettings, progress: bool = True
) -> Iterator[Picture]:
    """As `text_to_image`, but each drawing starts from the noised latent of a picture (SDEdit, arXiv 2108.01073).

    The picture is resized to the settings' height and width. Random numbers come in the published order: the first stage's
    posterior, then batch after batch the noise of the start and of the steps. At strength 0 nothing is drawn: the result is
    the first stage's round trip.
    """
    import torch

    settings = settings.checked(pipeline.facts)
    encode = _own_encoder(pipeline, settings)
    randomness, model, walked = Randomness(settings.seed, pipeline.device), pipeline.model, settings.encode_steps
    sampler = pipeline.sampler(settings.sampler)
    sampler.make_schedule(ddim_num_steps=settings.steps, ddim_eta=settings.eta, verbose=False)
    with randomness(), torch.no_grad():                                     # in float32, as published
        x = pipeline.tensor(fit(image, settings.height, settings.width)).expand(settings.n_samples, -1, -1, -1)
        z0 = model.get_first_stage_encoding(model.encode_first_stage(x))    # (n_samples, c, h, w)
        noise = torch.randn_like(z0) if settings.fixed_code else None

    def draw(batch_size: int, cond: Tensor, uncond: Tensor | None, tick: Callable[[int], None]) -> Tensor:
        z = z0[:batch_size]
        if walked == 0:
            return z
        t = torch.full((batch_size,), walked, dtype=torch.int64, device=pipeline.device)
        z = sampler.stochastic_encode(z, t, noise=noise[:batch_size] if noise is not None else None)
        return sampler.decode(z, cond, walked, settings.scale, uncond, callback=tick, verbose=False)

    yield from _drawn("img2img", pipeline, prompts, settings, walked, encode, draw, randomness, progress)


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """The picture in the size that the model takes; one line says so where it changes."""
    if image.size == (width, height):
        return image
    logger.info("resized from %dx%d to %dx%d pixels, the nearest size that the model takes", image.width, image.height, width, height)
    from ldm.data.image import resampling

    return image.resize((width, height), resampling("lanczos"))


def _own_encoder(pipeline: Pipeline, settings: Settings) -> Encode:
    """The model's condition stage, which has to take text."""
    check_takes_text(pipeline.facts)
    return lambda prompts: pipeline.encode_prompts(prompts, settings.negative_prompt, settings.scale)


def _drawn(
    task: str,
    pipeline: Pipeline,
    prompts: str | Sequence[str],
    settings: Settings,
    steps: int,
    encode: Encode,
    draw: Callable[[int, Any, Any, Callable[[int], None]], Tensor],
    randomness: Randomness,
    progress: bool,
) -> Iterator[Picture]:
    """Finished pictures of what `draw` makes of every batch of prompts: latents (B, c, h, w)."""
    from tqdm import tqdm

    n_prompts = 1 if isinstance(prompts, str) else len(prompts)             # fixes the sizes of the batches, and so the noise
    batches, index = batches_of(prompts, settings.n_samples) * settings.n_iter, 0
    with tqdm(total=len(batches) * steps, desc="drawing", unit="step", disable=not progress or steps == 0) as bar:
        for number, batch in enumerate(batches):
            with randomness(), pipeline.drawing():
                cond, uncond = encode(batch)
                images = pipeline.decode(draw(len(batch), cond, uncond, lambda i: bar.update()))
            for k, picture in enumerate(finished(images, batch, pipeline, settings)):
                place = {"image_index": index, "batch_index": number, "index_in_batch": k, "batch_size": len(batch), "n_prompts": n_prompts}
                yield Picture(picture.image, {"task": task, **picture.info, **place})
                index += 1


def finished(images: Tensor, prompts: Sequence[str], pipeline: Pipeline, settings: Settings) -> Iterator[Picture]:
    """Pictures of one batch (B, 3, H, W) in [-1, 1], each with its prompt, the settings and the model's identity."""
    from ldm.data.image import from_tensor

    for image, prompt in zip(images, prompts, strict=True):
        yield Picture(from_tensor(image), {"prompt": prompt, **asdict(settings), **pipeline.identity})
