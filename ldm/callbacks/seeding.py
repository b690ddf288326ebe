"""Seed every step from its place in the run."""

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

    So a resumed run uses the random numbers of an uninterrupted one, validation and image logs do not change training,
    ranks differ, and every validation uses the same noise, which makes its metrics comparable.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.began = False  # True once a training batch has begun; errors before that come from the config

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
