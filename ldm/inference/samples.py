"""Samples of unconditional and class-conditional models, for looking at and for evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ldm.inference.pipeline import Pipeline
from ldm.inference.randomness import Randomness
from ldm.pictures import Picture
from ldm.settings import ModelFacts
from ldm.task_settings import SampleSettings

if TYPE_CHECKING:
    from torch import Tensor


def draw_samples(pipeline: Pipeline, settings: SampleSettings, progress: bool = True) -> Iterator[Picture]:
    """Exactly `settings.n_samples` pictures, `batch_size` at a time, the last batch with what is left; `info["class"]` is its class."""
    from tqdm import tqdm

    from ldm.data.image import from_tensor

    settings = settings.checked(pipeline.facts)
    classes, randomness, index = class_order(pipeline.facts, settings), Randomness(settings.seed, pipeline.device), 0
    n_batches = -(-settings.n_samples // settings.batch_size)
    steps = pipeline.facts.timesteps if settings.vanilla else settings.steps
    shared = {name: value for name, value in asdict(settings).items() if name != "classes"}  # thousands of numbers in every file else
    with tqdm(total=n_batches * steps, desc="drawing", unit="step", disable=not progress) as bar:
        while index < settings.n_samples:
            size = min(settings.batch_size, settings.n_samples - index)
            labels = list(itertools.islice(classes, size)) if classes is not None else [None] * size
            with randomness(), pipeline.drawing():
                cond, uncond = _class_conditions(pipeline, labels, settings)
                images = pipeline.decode(_draw(pipeline, size, cond, uncond, settings, lambda i: bar.update()))
            for image, label in zip(images, labels, strict=True):
                place = {"class": label, "image_index": index}
                yield Picture(from_tensor(image), {"task": "sample_diffusion", **shared, **pipeline.identity, **place})
                index += 1


def class_order(facts: ModelFacts, settings: SampleSettings) -> Iterator[int] | None:
    """The class of each sample: those asked for in turn, else all in an order that follows from the seed; None without classes."""
    import random

    if facts.n_classes is None:
        return None
    if settings.classes is not None:
        return itertools.cycle(settings.classes)
    every = [c for c in range(facts.n_classes) if c != settings.null_class]
    return itertools.cycle(random.Random(settings.seed).sample(every, len(every)))


def _class_conditions(pipeline: Pipeline, labels: list[int | None], settings: SampleSettings) -> tuple[Any, Any]:
    """(condition, what guidance leads away from) of a batch; None for each that there is not."""
    import torch

    if labels[0] is None:
        return None, None
    model = pipeline.model
    key = model.cond_stage_model.key

    def encoded(values: list[int]) -> Any:
        return model.get_learned_conditioning({key: torch.tensor(values, device=pipeline.device)})

    return encoded(labels), encoded([settings.null_class] * len(labels)) if settings.scale != 1.0 else None


def _draw(pipeline: Pipeline, size: int, cond: Any, uncond: Any, settings: SampleSettings, tick: Callable[[int], None]) -> Tensor:
    """Latents (B, c, h, w) from noise, by DDIM or by the ancestral chain."""
    model, facts = pipeline.model, pipeline.facts
    shape = (facts.channels, *facts.image_size)
    if settings.vanilla and getattr(model, "clip_denoised", False):         # models of pixels clip x_0 on the way
        return model.sample(cond, batch_size=size, shape=(size, *shape))
    common = {"batch_size": size, "shape": shape, "conditioning": cond, "unconditional_conditioning": uncond}
    common |= {"unconditional_guidance_scale": settings.scale, "callback": tick, "verbose": False}
    if settings.vanilla:
        from ldm.models.diffusion.ancestral import AncestralSampler

        return AncestralSampler(model).sample(S=facts.timesteps, eta=1.0, log_every_t=facts.timesteps + 1, **common)[0]
    return pipeline.sampler("ddim").sample(S=settings.steps, eta=settings.eta, log_every_t=settings.steps + 1, **common)[0]
