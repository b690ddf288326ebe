"""Pictures from prompts: from noise, or from a picture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.inference.concat import with_parts
from ldm.inference.pipeline import Pipeline
from ldm.inference.prompt_weights import PromptEncoder, check_emphasis
from ldm.inference.randomness import Randomness, Silent, noise_of
from ldm.inference.settings import TextToImageRequest, batches_of, require_text_model
from ldm.inference.task_settings import ImageToImageRequest
from ldm.models.diffusion.samplers.registry import make_sampler
from ldm.output.images import GeneratedImage

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.models.diffusion.samplers.base import Sampler
    from ldm.models.diffusion.samplers.noise import NoiseSource

logger = logging.getLogger(__name__)


Encode = Callable[[Sequence[str]], tuple[Any, Any]]
"""A batch of prompts -> (condition, what guidance leads away from; None without guidance)."""


class Conditioned(NamedTuple):
    """What leads a batch, and what is called after each of its steps."""

    cond: Any = None
    uncond: Any = None
    scale: float = 1.0
    tick: Callable[[int], None] | None = None


class Batch(NamedTuple):
    """What is drawn at once: its number, the places of its pictures in the run, their prompts."""

    number: int
    places: range
    prompts: list[str]


SampleLatents = Callable[["Sampler", "Batch", "NoiseSource", Conditioned], "Tensor"]
"""(sampler, batch, its noise, what leads it) -> latents (B, c, h, w)."""


def text_to_image(
    pipeline: Pipeline,
    prompts: str | Sequence[str],
    settings: TextToImageRequest,
    progress: bool = True,
    encode: Encode | None = None,
    task: str = "txt2img",
    only: int | None = None,
) -> Iterator[GeneratedImage]:
    """Draw `settings.n_iter` times: `n_samples` pictures of the one prompt, or one of each prompt of a list, `n_samples` at a time.

    Noise is drawn as published (first the fixed code, then batch after batch), so that a seed gives the published picture, or with
    `seed_mode` "image" for each picture from a seed of its own.
    encode: makes conditions of prompts where the model's own condition stage does not (retrieval-augmented models).
    task: the name of it all in the metadata.
    only: draw the picture at this place alone (its `image_index`), as the whole run would.
    """
    import torch

    settings = settings.checked(pipeline.info)
    if encode is None:
        settings, encode = _own_encoder(pipeline, prompts, settings)
    shape, randomness = settings.latent_shape, Randomness(settings.seed, pipeline.device)
    start = None
    if settings.fixed_code:
        with randomness():
            start = torch.randn((settings.n_samples, *shape), device=pipeline.device)

    def sample_latents(sampler: Sampler, batch: Batch, noise: NoiseSource, guided: Conditioned) -> Tensor:
        z, _ = sampler.sample(
            S=settings.steps,
            batch_size=len(batch.prompts),
            shape=shape,
            conditioning=guided.cond,
            eta=settings.eta,
            x_T=start[: len(batch.prompts)] if start is not None else None,
            unconditional_guidance_scale=guided.scale,
            unconditional_conditioning=guided.uncond,
            callback=guided.tick,
            log_every_t=settings.steps + 1,
            verbose=False,
            noise_source=noise,
            **settings.sampler_options,
        )
        return z

    yield from _generate(
        task, pipeline, prompts, settings, settings.steps, encode, sample_latents, randomness, progress, only
    )


def image_to_image(
    pipeline: Pipeline,
    image: Image.Image,
    prompts: str | Sequence[str],
    settings: ImageToImageRequest,
    progress: bool = True,
    only: int | None = None,
    beside: Mapping[str, Any] | None = None,
) -> Iterator[GeneratedImage]:
    """As `text_to_image`, but each drawing starts from the noised latent of a picture (SDEdit, arXiv 2108.01073).

    The picture is resized to the settings' height and width. Random numbers come in the published order: the first stage's
    posterior, then batch after batch the noise of the start and of the steps; with `seed_mode` "image" all of them for each picture.
    At strength 0 nothing is drawn: the result is the first stage's round trip.
    beside: further parts of the condition, `depth_parts` of a depth-to-image model.
    """
    import torch

    settings = settings.checked(pipeline.info)
    settings, encode = _own_encoder(pipeline, prompts, settings, beside)
    model, randomness, walked = (
        in_tiles(pipeline, settings).model,
        Randomness(settings.seed, pipeline.device),
        settings.encode_steps,
    )
    alone, start, z0 = settings.seed_mode == "image", None, None
    with randomness(), torch.no_grad():  # outside of autocast, as published
        x = pipeline.tensor(fit(image, settings.height, settings.width))
        posterior = model.encode_first_stage(x if alone else x.expand(settings.n_samples, -1, -1, -1))
        if not alone:
            z0 = model.get_first_stage_encoding(posterior)  # (n_samples, c, h, w)
            start = torch.randn_like(z0) if settings.fixed_code else None

    def sample_latents(sampler: Sampler, batch: Batch, noise: NoiseSource, guided: Conditioned) -> Tensor:
        size = len(batch.prompts)
        z = model.get_first_stage_encoding(_sampled(posterior, noise, size)) if alone else z0[:size]
        if walked == 0:
            return z
        sampler.make_schedule(settings.steps, settings.spacing, settings.eta, verbose=False)
        t = torch.full((size,), walked, dtype=torch.int64, device=pipeline.device)
        z = sampler.stochastic_encode(z, t, noise=noise.normal_like(z) if start is None else start[:size])
        options = {"noise_source": noise, **settings.prediction_options}
        return sampler.decode(
            z, guided.cond, walked, guided.scale, guided.uncond, callback=guided.tick, verbose=False, **options
        )

    yield from _generate(
        "img2img", pipeline, prompts, settings, walked, encode, sample_latents, randomness, progress, only
    )


def _sampled(posterior: Any, noise: NoiseSource, size: int) -> Tensor:
    """Latents (size, c, h, w) of one picture's posterior, each with its own noise; latents that are none are repeated."""
    import torch

    if torch.is_tensor(posterior):
        return posterior.expand(size, -1, -1, -1)
    return posterior.mode() + posterior.std * noise.normal_like(posterior.mode().expand(size, -1, -1, -1))


def in_tiles(pipeline: Pipeline, settings: TextToImageRequest) -> Pipeline:
    """The pipeline with a first stage that sees square tiles, half of which neighbors share, where that is asked for.

    The network sees the whole latent; memory of encoding and decoding grows with a tile.
    """
    if not settings.tiled:
        return pipeline
    from copy import copy

    from ldm.models.diffusion.tiling import TiledModel, Tiling

    factor = pipeline.info.factor or settings.factor
    cells, tiled = settings.tiled // factor, copy(pipeline)
    tiled.model = TiledModel(pipeline.model, Tiling(cells, cells // 2), factor)
    return tiled


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """The picture in the size that the model takes; one line says so where it changes."""
    if image.size == (width, height):
        return image
    logger.info(
        "resized from %dx%d to %dx%d pixels, the nearest size that the model takes",
        image.width,
        image.height,
        width,
        height,
    )
    from ldm.data.image import resampling

    return image.resize((width, height), resampling("lanczos"))


def _own_encoder(
    pipeline: Pipeline,
    prompts: str | Sequence[str],
    settings: TextToImageRequest,
    beside: Mapping[str, Any] | None = None,
) -> tuple[TextToImageRequest, Encode]:
    """(settings with the number of chunks, the model's condition stage), which has to take text; further parts join what it encodes."""
    require_text_model(pipeline.info, beside=sum(part.shape[1] for part in (beside or {}).get("c_concat", ())))
    settings, encode = _text_encoder(pipeline, prompts, settings)
    if beside is None:
        return settings, encode

    def encode_beside(batch: Sequence[str]) -> tuple[Any, Any]:
        cond, uncond = encode(batch)
        return with_parts(cond, beside), None if uncond is None else with_parts(uncond, beside)

    return settings, encode_beside


def _text_encoder(
    pipeline: Pipeline, prompts: str | Sequence[str], settings: TextToImageRequest
) -> tuple[TextToImageRequest, Encode]:
    negative, scale = settings.negative_prompt, settings.scale
    if not (settings.emphasis or settings.long_prompts):
        return settings, lambda batch: pipeline.encode_prompts(batch, negative, scale)
    every = [prompts] if isinstance(prompts, str) else list(prompts)
    if settings.emphasis:
        check_emphasis(every)
    encoder = PromptEncoder(pipeline.model.cond_stage_model, settings.emphasis, settings.long_prompts)
    needed = encoder.chunks_for([*every, negative])
    if settings.long_prompts:
        settings = replace(settings, chunks=max(needed, settings.chunks or 1))

    def encode(batch: Sequence[str]) -> tuple[Any, Any]:
        chunks = settings.chunks or 1
        return encoder(batch, chunks), encoder([negative] * len(batch), chunks) if scale != 1.0 else None

    return settings, encode


def _generate(
    task: str,
    pipeline: Pipeline,
    prompts: str | Sequence[str],
    settings: TextToImageRequest,
    steps: int,
    encode: Encode,
    sample_latents: SampleLatents,
    randomness: Randomness,
    progress: bool,
    only: int | None,
) -> Iterator[GeneratedImage]:
    """Finished pictures of what `walk` makes of every batch of prompts; `only` that at one place."""
    from tqdm import tqdm

    n_prompts = 1 if isinstance(prompts, str) else len(prompts)  # fixes the sizes of the batches, and so the noise
    batches = list(_batches(prompts, settings))
    if only is not None and not 0 <= only < batches[-1].places.stop:
        raise ValueError(f"picture {only}: this run has 0 to {batches[-1].places.stop - 1}")
    sampler, stage = pipeline.sampler(settings.sampler), in_tiles(pipeline, settings)
    drawn = batches if only is None else [batch for batch in batches if only in batch.places]
    with tqdm(total=len(drawn) * steps, desc="drawing", unit="step", disable=not progress or steps == 0) as bar:
        for batch in batches[: drawn[-1].number + 1]:
            kept = [place for place in batch.places if only in (None, place)]
            if not kept:  # its random numbers are used up, and nothing else
                if settings.seed_mode == "batch":
                    with randomness(), pipeline.drawing():
                        sample_latents(
                            make_sampler(settings.sampler, Silent(pipeline.model)),
                            batch,
                            noise_of("batch", 0, []),
                            Conditioned(),
                        )
                continue
            one = only is not None and settings.seed_mode == "image"
            at_once = (
                batch._replace(places=range(only, only + 1), prompts=[batch.prompts[only - batch.places.start]])
                if one
                else batch
            )
            noise = noise_of(settings.seed_mode, settings.seed, at_once.places)
            with randomness(), pipeline.drawing():
                cond, uncond = encode(at_once.prompts)
                z = sample_latents(
                    sampler, at_once, noise, Conditioned(cond, uncond, settings.scale, lambda i: bar.update())
                )
                images = stage.decode(z)
            for index, picture in zip(at_once.places, finished(images, at_once.prompts, pipeline, settings)):
                place = {
                    "image_index": index,
                    "batch_index": batch.number,
                    "index_in_batch": index - batch.places.start,
                }
                place |= {"batch_size": len(batch.prompts), "n_prompts": n_prompts}
                if index in kept:
                    yield GeneratedImage(picture.image, {"task": task, **picture.info, **place})


def _batches(prompts: str | Sequence[str], settings: TextToImageRequest) -> Iterator[Batch]:
    first = 0
    for number, batch in enumerate(batches_of(prompts, settings.n_samples) * settings.n_iter):
        yield Batch(number, range(first, first + len(batch)), batch)
        first += len(batch)


def finished(
    images: Tensor, prompts: Sequence[str], pipeline: Pipeline, settings: TextToImageRequest
) -> Iterator[GeneratedImage]:
    """Pictures of one batch (B, 3, H, W) in [-1, 1], each with its prompt, the settings and the model's identity."""
    from ldm.data.image import from_tensor

    for image, prompt in zip(images, prompts, strict=True):
        yield GeneratedImage(from_tensor(image), {"prompt": prompt, **asdict(settings), **pipeline.identity})
