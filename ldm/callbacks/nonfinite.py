"""Stop before a loss or gradient that is not finite reaches the weights."""

from __future__ import annotations

import math

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from ldm.models.training import NonFiniteError


class StopOnNonFinite(pl.Callback):
    """Raise NonFiniteError before the optimizer step if a loss or a gradient is NaN or infinite.

    float16's loss scaler handles infinite gradients by skipping the step: there only a NaN loss stops the run.
    A module with manual optimization that checks in its own `on_before_optimizer_step` is left alone.
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
        loss = torch.stack([each.float().reshape(()) for each in losses]).sum() if losses else torch.zeros(())
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            fine = not bool(loss.isnan())
        else:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            # The norm of all gradients, which is five times faster than their maximum.
            norm = get_total_norm([_values(each) for each in gradients]).float() if gradients else torch.zeros(())
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of sharded gradients
            fine = bool((loss.to(norm.device) + norm).isfinite())  # one read from the device for both
        if not fine:
            raise NonFiniteError(_message(trainer, pl_module, losses))


def _message(trainer: pl.Trainer, pl_module: pl.LightningModule, losses: list[Tensor]) -> str:
    place = f"epoch {trainer.current_epoch}, step {trainer.global_step}, rank {trainer.global_rank}"
    gradients = [(name, p.grad) for name, p in pl_module.named_parameters() if p.grad is not None]
    gradients = [(name, each.to_local() if isinstance(each, DTensor) else each) for name, each in gradients]
    bad = [name for name, gradient in gradients if not bool(_values(gradient).isfinite().all())]
    bad_losses = [value for value in map(float, losses) if not math.isfinite(value)]
    what = f"the loss is {bad_losses[0]:g}" if bad_losses else f"the loss is finite ({sum(map(float, losses)):g})"
    if bad:
        shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        what += f", gradients of {len(bad)} tensors are not finite ({shown})"
    advice = "try a lower model.base_learning_rate, --gradient_clip_val 1 or --precision 32"
    return f"{place}: {what}; stopped before the update, so the weights and last.ckpt are intact; {advice}"


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient
