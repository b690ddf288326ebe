"""Images from prompts, and the loop over batches of prompts that image-to-image shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.data.image import from_tensor
from ldm.inference.concat import Parts, with_parts
from ldm.inference.pipeline import Conditioned, Pipeline, progress_bar
from ldm.inference.prompt_weights import PromptEncoder
from ldm.inference.randomness import Randomness, SilentModel, noise_of
from ldm.inference.requests import Batch, TextToImageRequest
from ldm.models.diffusion.samplers.noise import NoiseSource
from ldm.models.diffusion.tiling import TiledModel, Tiling
from ldm.modules.encoders.base import AbstractEncoder
from ldm.output.images import GeneratedImage

Encode = Callable[[Sequence[str]], tuple[Any, Any]]
"""A batch of prompts -> (cond, uncond); uncond is None without guidance."""

SampleLatents = Callable[[Pipeline, Batch, NoiseSource, Conditioned], Tensor]
"""(pipeline, batch, its noise, its conditioning) -> latents (B, c, h, w)."""


def text_to_image(
    pipeline: Pipeline,
    request: TextToImageRequest,
    progress: bool = True,
    encode: Encode | None = None,
    only: int | None = None,
    parts: Parts | None = None,
    uncond_parts: Parts | None = None,
) -> Iterator[GeneratedImage]:
    """Generate `n_iter` times: `n_samples` images of one prompt, or an image of each prompt of a list.

    Random numbers are used in the published order (the fixed code, then batch after batch): a seed gives the published
    image.
    encode: conditioning of prompts for models whose condition stage does not encode text (retrieval-augmented models).
    only: generate the image with this `image_index` alone, as it is in the whole run.
    parts, uncond_parts: as in `generate_batches`.
    """
    request = request.checked(pipeline.info)
    randomness = Randomness(request.seed, pipeline.device)
    start: Tensor | None = None
    if request.fixed_code:
        with randomness():
            start = torch.randn((request.n_samples, *request.latent_shape), device=pipeline.device)

    def sample_latents(pipeline: Pipeline, batch: Batch, noise: NoiseSource, given: Conditioned) -> Tensor:
        size = len(batch.prompts)
        x_T = None if start is None else start[:size]
        return pipeline.sample(request, (size, *request.latent_shape), given, noise, x_T)

    assert request.steps is not None
    yield from generate_batches(
        pipeline, request, request.steps, sample_latents, randomness, encode, parts, progress, only, uncond_parts
    )


def generate_batches(
    pipeline: Pipeline,
    request: TextToImageRequest,
    steps: int,
    sample_latents: SampleLatents,
    randomness: Randomness,
    encode: Encode | None = None,
    parts: Parts | None = None,
    progress: bool = True,
    only: int | None = None,
    uncond_parts: Parts | None = None,
) -> Iterator[GeneratedImage]:
    """Encode, sample and decode every batch of a checked request; `parts` are further conditioning of all images.

    uncond_parts: those of the unconditional prediction, if they differ.
    """
    uncond_parts = parts if uncond_parts is None else uncond_parts
    assert request.scale is not None
    record = request.record()
    if encode is None:
        encode, record["chunks"] = prompt_encoder(pipeline, request)
    batches = request.batches
    count = batches[-1].indices.stop
    if only is not None and not 0 <= only < count:
        raise ValueError(f"image {only}: this run has images 0 to {count - 1}")
    tiled = in_tiles(pipeline, request)
    needed = batches if only is None else [batch for batch in batches if only in batch.indices]
    # How many images a run has fixes its batches, and so the noise.
    run = {"n_prompts": len(request.prompts), **pipeline.identity}
    with progress_bar(len(needed) * steps, progress) as bar:
        for batch in batches[: needed[-1].number + 1]:
            if batch not in needed:
                if request.seed_mode == "batch":
                    with randomness(), pipeline.sampling():
                        sample_latents(
                            pipeline.with_model(SilentModel(pipeline.model)),
                            batch,
                            noise_of("batch", 0, []),
                            Conditioned(),
                        )
                continue
            part = batch
            if only is not None and request.seed_mode == "image":  # its noise is independent of the rest of the batch
                part = Batch(batch.number, range(only, only + 1), [batch.prompts[only - batch.indices.start]])
            noise = noise_of(request.seed_mode, request.seed, part.indices)
            with randomness(), pipeline.sampling(request):
                cond, uncond = encode(part.prompts)
                cond, uncond = with_parts(cond, parts), with_parts(uncond, uncond_parts)
                given = Conditioned(
                    cond, uncond, request.scale, lambda i: bar.update(), image_scale=request.image_scale
                )
                images = tiled.decode(sample_latents(pipeline, part, noise, given))
            for index, prompt, image in zip(part.indices, part.prompts, images, strict=True):
                if only in (None, index):
                    place = {"batch_index": batch.number, "index_in_batch": index - batch.indices.start}
                    place |= {"image_index": index, "batch_size": len(batch.prompts)}
                    yield GeneratedImage(from_tensor(image), {**record, **run, **place, "prompt": prompt})


def prompt_encoder(pipeline: Pipeline, request: TextToImageRequest) -> tuple[Encode, int | None]:
    """The model's own conditioning of prompts, and the number of chunks per prompt (None without `long_prompts`)."""
    negative, guided = request.negative_prompt, request.guided
    texts = [*request.prompts, *([negative] if guided else [])]
    if not (request.emphasis or request.long_prompts):
        if isinstance(stage := pipeline.model.cond_stage_model, AbstractEncoder):
            stage.warn_of_long_texts(texts)
        return lambda batch: pipeline.encode_prompts(batch, negative, guided), None
    encoder = PromptEncoder(pipeline.model.cond_stage_model, request.emphasis, request.long_prompts)
    encoder.warn_of_long_texts(texts)
    chunks = max(encoder.chunks_for([*request.prompts, negative]), request.chunks or 1)

    def encode(batch: Sequence[str]) -> tuple[Any, Any]:
        return encoder(batch, chunks), encoder([negative] * len(batch), chunks) if guided else None

    return encode, chunks if request.long_prompts else None


def in_tiles(pipeline: Pipeline, request: TextToImageRequest) -> Pipeline:
    """The pipeline with a first stage that works in square tiles, which share half of their side, if requested.

    The network sees the whole latent; memory of encoding and decoding grows with the tile.
    """
    factor = pipeline.info.factor or request.factor
    if not request.tiled or factor is None:
        return pipeline
    cells = request.tiled // factor
    return pipeline.with_model(TiledModel(pipeline.model, Tiling((cells, cells), (cells // 2, cells // 2)), factor))
