"""Around every training step: random numbers that depend on its place alone, and a stop before anything that is not finite is learned."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.nn.utils import get_total_norm

from ldm.data.order import mix
from ldm.models.training import NonFiniteError

TRAIN, EVALUATE = 11, 12  # purposes of random numbers, beside those of ldm.data.order


class StepSeed(pl.Callback):
    """Seeds Python, NumPy and PyTorch at every batch from (seed, rank, epoch, batch).

    A resumed run therefore draws what an uninterrupted one would have drawn, validation and image logs change nothing, ranks
    draw different numbers, and every validation sees the same noise, so that its figures compare.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.began = False  # whether a training batch has begun: what fails before is a mistake of the start

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.began = True
        seed_generators(mix(self.seed, TRAIN, trainer.global_rank, trainer.current_epoch, batch_idx))

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        seed_generators(mix(self.seed, EVALUATE, trainer.global_rank, dataloader_idx, batch_idx))

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (all devices) with 63 bits."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


class StopOnNonFinite(pl.Callback):
    """Raises NonFiniteError before the optimizer's step where a loss or a gradient is NaN or infinite.

    With float16's loss scaling an infinite gradient is normal (the scaler skips that step): there only a NaN loss stops the run.
    A module that steps its optimizers itself and checks them in `on_before_optimizer_step` is left to do so.
    """

    def __init__(self) -> None:
        super().__init__()
        self._losses: list[Tensor] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._active = pl_module.automatic_optimization or not is_overridden("on_before_optimizer_step", pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._active:
            self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self._active:
            return
        losses, self._losses = self._losses, []
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        loss = torch.stack([each.float().reshape(()) for each in losses]).sum() if losses else torch.zeros(())
        if scaled:
            fine = not bool(loss.isnan())
        else:
            norm = _norm(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
            fine = bool((loss.to(norm.device) + norm).isfinite())  # one read from the device for both
        if not fine:
            raise NonFiniteError(self._message(trainer, pl_module, losses))

    def _message(self, trainer: pl.Trainer, pl_module: pl.LightningModule, losses: list[Tensor]) -> str:
        place = f"epoch {trainer.current_epoch}, step {trainer.global_step}, rank {trainer.global_rank}"
        bad = [
            name
            for name, p in pl_module.named_parameters()
            if p.grad is not None and not bool(_values(p.grad).isfinite().all())
        ]
        bad_losses = [value for value in map(float, losses) if not math.isfinite(value)]
        what = f"the loss is {bad_losses[0]:g}" if bad_losses else f"the loss is finite ({sum(map(float, losses)):g})"
        if bad:
            what += f", gradients of {len(bad)} tensors are not finite ({', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''})"
        advice = "a lower model.base_learning_rate, --gradient_clip_val 1 or --precision 32 often helps"
        return f"{place}: {what}; stopped before the update, so the weights and last.ckpt are good; {advice}"


def _norm(gradients: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients (five times faster than their maximum): a scalar on their device, not finite where one is not."""
    values = [_values(gradient) for gradient in gradients]
    return get_total_norm(values).float() if values else torch.zeros(())


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient
