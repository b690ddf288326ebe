"""Random numbers of every batch from its samples and its place in the run."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from ldm.data.datamodule import DataModuleFromConfig
from ldm.rng import mix, seed_generators, set_samples

TRAIN, EVALUATE = 11, 12  # purposes of random numbers, distinct from those of ldm.data.order and ldm.rng


class StepSeed(pl.Callback):
    """Give every batch the random numbers of its samples, and seed Python, NumPy and PyTorch from its place in the run.

    Random numbers that a model takes from ldm.rng belong to the samples of a DataModuleFromConfig and are the same for
    every batch size and number of ranks. All others (dropout within networks, other data modules) come from the global
    generators, seeded from (seed, rank, epoch, batch). So a resumed run uses the random numbers of an uninterrupted
    one, validation and image logs do not change training, and every validation uses the same noise, which makes its
    metrics comparable.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.began = False  # True once a training batch has begun; errors before that come from the config

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.began = True
        seed = mix(self.seed, TRAIN, trainer.global_rank, trainer.current_epoch, batch_idx)
        # Seeding devices that are not used takes a millisecond.
        seed_generators(seed, all_devices=trainer.strategy.root_device.type != "cpu")
        data = getattr(trainer, "datamodule", None)
        set_samples(data.training_samples() if isinstance(data, DataModuleFromConfig) else None)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._start_evaluation(trainer, "validation", batch_idx, dataloader_idx)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._start_evaluation(trainer, "test", batch_idx, dataloader_idx)

    def _start_evaluation(self, trainer: pl.Trainer, split: str, batch_idx: int, dataloader_idx: int) -> None:
        seed_generators(mix(self.seed, EVALUATE, trainer.global_rank, dataloader_idx, batch_idx))
        data = getattr(trainer, "datamodule", None)
        set_samples(data.evaluation_samples(split, batch_idx) if isinstance(data, DataModuleFromConfig) else None)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        set_samples(None)  # image logs and other callbacks use the global generators

    on_validation_batch_end = on_test_batch_end = on_exception = on_train_batch_end
