"""Samples of unconditional and class-conditional models."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.config.model_info import ModelInfo
from ldm.data.image import from_tensor
from ldm.inference.pipeline import Conditioned, Pipeline, progress_bar
from ldm.inference.randomness import Randomness, noise_of
from ldm.inference.requests import ClassConditionalRequest
from ldm.models.diffusion.samplers.noise import NoiseSource
from ldm.models.diffusion.samplers.registry import make_sampler
from ldm.output.images import GeneratedImage


def generate_samples(
    pipeline: Pipeline, request: ClassConditionalRequest, progress: bool = True
) -> Iterator[GeneratedImage]:
    """Generate exactly `n_samples` images, `batch_size` at a time; `info["class"]` is the class."""
    request = request.checked(pipeline.info)
    assert request.steps is not None and request.scale is not None
    classes, randomness = class_order(pipeline.info, request), Randomness(request.seed, pipeline.device)
    steps = pipeline.info.timesteps if request.vanilla else request.steps
    record = {**request.record(), **pipeline.identity}
    with progress_bar(-(-request.n_samples // request.batch_size) * steps, progress) as bar:
        for first in range(0, request.n_samples, request.batch_size):
            indices = range(first, min(first + request.batch_size, request.n_samples))
            labels = None if classes is None else list(itertools.islice(classes, len(indices)))
            with randomness(), pipeline.sampling(request):
                cond, uncond = _class_conditioning(pipeline, labels, request)
                given = Conditioned(cond, uncond, request.scale, lambda i: bar.update())
                noise = noise_of(request.seed_mode, request.seed, indices)
                images = pipeline.decode(_sample_latents(pipeline, len(indices), given, request, noise))
            for index, label, image in zip(indices, labels or itertools.repeat(None), images):
                yield GeneratedImage(from_tensor(image), {**record, "class": label, "image_index": index})


def class_order(info: ModelInfo, request: ClassConditionalRequest) -> Iterator[int] | None:
    """The class of each sample: the requested ones in turn, else all, shuffled by the seed; None without classes."""
    if info.n_classes is None:
        return None
    if request.classes is not None:
        return itertools.cycle(request.classes)
    every = [c for c in range(info.n_classes) if c != request.null_class]
    return itertools.cycle(random.Random(request.seed).sample(every, len(every)))


def _class_conditioning(
    pipeline: Pipeline, labels: list[int] | None, request: ClassConditionalRequest
) -> tuple[Any, Any]:
    """(cond, uncond) of a batch; None if unused."""
    if labels is None:
        return None, None
    model = pipeline.model

    def encode(classes: Sequence[int | None]) -> Any:
        return model.get_learned_conditioning(
            {model.cond_stage_model.key: torch.tensor(classes, device=pipeline.device)}
        )

    guided = request.scale != 1.0 and request.null_class is not None
    return encode(labels), encode([request.null_class] * len(labels)) if guided else None


def _sample_latents(
    pipeline: Pipeline, size: int, given: Conditioned, request: ClassConditionalRequest, noise: NoiseSource
) -> Tensor:
    """Latents (B, c, h, w) by the request's sampler, or by ancestral sampling over every timestep."""
    info = pipeline.info
    shape = (size, info.channels, *info.image_size)
    if not request.vanilla:
        return pipeline.sample(request, shape, given, noise)
    sampler = make_sampler("ancestral", pipeline.model)
    sampler.make_schedule(info.timesteps, verbose=False)
    x_T = noise.normal(shape, pipeline.device, torch.float32)
    clip = getattr(pipeline.model, "clip_denoised", False)  # models in pixel space clip the predicted x_0
    options = {"clip_denoised": clip, "noise_source": noise, **request.prediction_options}
    options |= {"callback": given.callback, "img_callback": pipeline.watch, "verbose": False}
    return sampler.decode(x_T, given.cond, info.timesteps, given.scale, given.uncond, **options)
