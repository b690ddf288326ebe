"""Samples of unconditional and class-conditional models, for looking at and for evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ldm.config.model_info import ModelInfo
from ldm.inference.pipeline import Pipeline
from ldm.inference.randomness import Randomness, noise_of
from ldm.inference.task_settings import ClassConditionalRequest
from ldm.output.images import GeneratedImage

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.models.diffusion.samplers.noise import NoiseSource


def generate_samples(
    pipeline: Pipeline, settings: ClassConditionalRequest, progress: bool = True
) -> Iterator[GeneratedImage]:
    """Exactly `settings.n_samples` pictures, `batch_size` at a time, the last batch with what is left; `info["class"]` is its class."""
    from tqdm import tqdm

    from ldm.data.image import from_tensor

    settings = settings.checked(pipeline.info)
    classes, randomness, index = class_order(pipeline.info, settings), Randomness(settings.seed, pipeline.device), 0
    n_batches = -(-settings.n_samples // settings.batch_size)
    steps = pipeline.info.timesteps if settings.vanilla else settings.steps
    shared = {
        name: value for name, value in asdict(settings).items() if name != "classes"
    }  # thousands of numbers in every file else
    with tqdm(total=n_batches * steps, desc="drawing", unit="step", disable=not progress) as bar:
        while index < settings.n_samples:
            size = min(settings.batch_size, settings.n_samples - index)
            labels = list(itertools.islice(classes, size)) if classes is not None else [None] * size
            with randomness(), pipeline.drawing():
                cond, uncond = _class_conditions(pipeline, labels, settings)
                noise = noise_of(settings.seed_mode, settings.seed, range(index, index + size))
                images = pipeline.decode(_draw(pipeline, size, cond, uncond, settings, noise, lambda i: bar.update()))
            for image, label in zip(images, labels, strict=True):
                place = {"class": label, "image_index": index}
                yield GeneratedImage(
                    from_tensor(image), {"task": "sample_diffusion", **shared, **pipeline.identity, **place}
                )
                index += 1


def class_order(info: ModelInfo, settings: ClassConditionalRequest) -> Iterator[int] | None:
    """The class of each sample: those asked for in turn, else all in an order that follows from the seed; None without classes."""
    import random

    if info.n_classes is None:
        return None
    if settings.classes is not None:
        return itertools.cycle(settings.classes)
    every = [c for c in range(info.n_classes) if c != settings.null_class]
    return itertools.cycle(random.Random(settings.seed).sample(every, len(every)))


def _class_conditions(
    pipeline: Pipeline, labels: list[int | None], settings: ClassConditionalRequest
) -> tuple[Any, Any]:
    """(condition, what guidance leads away from) of a batch; None for each that there is not."""
    import torch

    if labels[0] is None:
        return None, None
    model = pipeline.model
    key = model.cond_stage_model.key

    def encoded(values: list[int]) -> Any:
        return model.get_learned_conditioning({key: torch.tensor(values, device=pipeline.device)})

    return encoded(labels), encoded([settings.null_class] * len(labels)) if settings.scale != 1.0 else None


def _draw(
    pipeline: Pipeline,
    size: int,
    cond: Any,
    uncond: Any,
    settings: ClassConditionalRequest,
    noise: NoiseSource,
    tick: Callable[[int], None],
) -> Tensor:
    """Latents (B, c, h, w) from noise, by a sampler or by the ancestral chain over every timestep."""
    import torch

    info, shape = pipeline.info, (pipeline.info.channels, *pipeline.info.image_size)
    if settings.vanilla:
        sampler = pipeline.sampler("ancestral")
        sampler.make_schedule(info.timesteps, verbose=False)
        clip = getattr(pipeline.model, "clip_denoised", False)  # models of pixels clip x_0 on the way
        options = {"clip_denoised": clip, "noise_source": noise, **settings.prediction_options}
        x_T = noise.normal((size, *shape), pipeline.device, torch.float32)
        return sampler.decode(
            x_T, cond, info.timesteps, settings.scale, uncond, callback=tick, verbose=False, **options
        )
    z, _ = pipeline.sampler(settings.sampler).sample(
        S=settings.steps,
        batch_size=size,
        shape=shape,
        conditioning=cond,
        eta=settings.eta,
        unconditional_guidance_scale=settings.scale,
        unconditional_conditioning=uncond,
        callback=tick,
        log_every_t=settings.steps + 1,
        verbose=False,
        noise_source=noise,
        **settings.sampler_options,
    )
    return z
