"""Check data against model once, where both are built and nothing is trained yet."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl

from ldm.config.consistency import size_problems
from ldm.config.instantiate import ConfigError
from ldm.data.datamodule import unwrapped
from ldm.data.image_dataset import ImageDataset
from ldm.modules.encoders import tokenizers
from ldm.modules.encoders.base import AbstractEncoder

logger = logging.getLogger(__name__)

_CAPTIONS = 10_000  # that are tokenized, about two seconds


class DataCheck(pl.Callback):
    """Raise ConfigError for image sizes that the model cannot process; log captions that its text encoder truncates."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        datasets = getattr(getattr(trainer, "datamodule", None), "datasets", {})
        core = getattr(pl_module, "diffusion_model", pl_module)  # of a classifier
        for problem in image_size_problems(core, datasets):
            raise ConfigError(problem)
        if stage == "fit":
            if trainer.is_global_zero:
                for text in single_buckets(core, datasets):
                    logger.warning("%-11s %s", "buckets", text)
                warn_of_long_captions(core, datasets)
            if isinstance(getattr(core, "cond_stage_model", None), AbstractEncoder):
                tokenizers.logger.setLevel(logging.ERROR)  # not again in every batch

    def teardown(self, *_: object, **__: object) -> None:
        tokenizers.logger.setLevel(logging.NOTSET)

    on_exception = teardown


def pixel_multiple(model: Any) -> tuple[int, int]:
    """Return the factors by which a model's first stage and its UNet shrink an image; 1 for a missing one."""
    encoder = getattr(getattr(model, "first_stage_model", model), "encoder", None)
    unet = getattr(getattr(model, "model", None), "diffusion_model", None)
    levels = getattr(encoder, "num_resolutions", 1), len(getattr(unet, "channel_mult", (1,)))
    return 2 ** (levels[0] - 1), 2 ** (levels[1] - 1)


def image_size_problems(model: Any, datasets: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for every dataset whose image size the model cannot process."""
    key = getattr(model, "first_stage_key", None) or getattr(model, "image_key", None)
    for split, data in _image_datasets(datasets).items():
        if key in (data.image_key, "segmentation"):
            param, sides = "size" if data.size == data.crop_size else "crop_size", data.crop_size
            if data.buckets is not None:
                param, sides = "buckets.step", (data.buckets.step,) * 2
            yield from size_problems(f"data.params.{split}.params.{param}", sides, pixel_multiple(model))


def single_buckets(model: Any, datasets: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for every dataset whose buckets allow a single size, so that they change nothing."""
    for split, data in _image_datasets(datasets).items():
        if data.buckets is not None and len(data.bucket_sizes) == 1:
            step, least = data.buckets.step, math.prod(pixel_multiple(model))
            advice = f"the smallest step of this model is {least}" if least < step else "set size to more"
            height, width = data.bucket_sizes[0].tolist()
            place = f"data.params.{split}.params.buckets"
            yield f"{place}.step {step}: one size only, {width}x{height}, at size {data.crop_size[0]}; {advice}"


def warn_of_long_captions(model: Any, datasets: Mapping[str, Any]) -> None:
    """Log one warning for the captions that the model's text encoder truncates."""
    encoder, key = getattr(model, "cond_stage_model", None), getattr(model, "cond_stage_key", None)
    if isinstance(encoder, AbstractEncoder):
        captioned = [data for data in _image_datasets(datasets).values() if key in (data.caption_key, "caption", "txt")]
        captions = itertools.chain.from_iterable(data.captions() for data in captioned)
        encoder.warn_of_long_texts(itertools.islice(captions, _CAPTIONS))


def _image_datasets(datasets: Mapping[str, Any]) -> dict[str, ImageDataset]:
    inner = {split: unwrapped(data) for split, data in datasets.items()}
    return {split: data for split, data in inner.items() if isinstance(data, ImageDataset)}
