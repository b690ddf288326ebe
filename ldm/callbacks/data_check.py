"""Check data against model once, where both are built and nothing is trained yet."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytorch_lightning as pl

from ldm.config.consistency import check_size
from ldm.data.image_dataset import ImageDataset
from ldm.modules.encoders import tokenizers
from ldm.modules.encoders.base import AbstractEncoder

_CAPTIONS = 10_000  # that are tokenized, about two seconds


class DataCheck(pl.Callback):
    """Raise ConfigError for image sizes that the model cannot process; log captions that its text encoder truncates."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        datasets = getattr(getattr(trainer, "datamodule", None), "datasets", {})
        folders = {split: getattr(data, "data", data) for split, data in datasets.items()}
        folders = {split: data for split, data in folders.items() if isinstance(data, ImageDataset)}
        core = getattr(pl_module, "diffusion_model", pl_module)  # of a classifier
        key = getattr(core, "first_stage_key", None) or getattr(core, "image_key", None)
        for split, data in folders.items():
            if key in (data.image_key, "segmentation"):
                param = "size" if data.size == data.crop_size else "crop_size"
                check_size(f"data.params.{split}.params.{param}", data.crop_size, pixel_multiple(core))
        encoder, key = getattr(core, "cond_stage_model", None), getattr(core, "cond_stage_key", None)
        if isinstance(encoder, AbstractEncoder) and stage == "fit":
            captioned = [data for data in folders.values() if key in (data.caption_key, "caption", "txt")]
            if trainer.is_global_zero:
                captions = itertools.chain.from_iterable(data.captions() for data in captioned)
                encoder.warn_of_long_texts(itertools.islice(captions, _CAPTIONS))
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
