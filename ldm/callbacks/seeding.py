"""Random numbers of a training step that depend only on its place in the run."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from ldm.data.order import mix

TRAIN, EVALUATE = 11, 12  # purposes of random numbers, distinct from those of ldm.data.order


class StepSeed(pl.Callback):
    """Seed Python, NumPy and PyTorch at every batch from (seed, rank, epoch, batch).

    So a resumed run samples what an uninterrupted one would have sampled, validation and image logs change nothing,
    ranks differ, and every validation sees the same noise, which makes its metrics comparable.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.began = False  # a training batch has begun: an earlier error comes from the configuration

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.began = True
        seed_generators(mix(self.seed, TRAIN, trainer.global_rank, trainer.current_epoch, batch_idx))

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        seed_generators(mix(self.seed, EVALUATE, trainer.global_rank, dataloader_idx, batch_idx))

    on_test_batch_start = on_validation_batch_start


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (all devices) with 63 bits."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)
