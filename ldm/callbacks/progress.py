"""What a run shows while it goes: a few lines at its start and end, and one bar over all of its steps."""

from __future__ import annotations

import logging
import math
import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar as LightningProgressBar
from torch import Tensor, nn
from tqdm import tqdm

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15.0


class ProgressBar(LightningProgressBar):
    """One bar over the whole run on a terminal, a line every few seconds elsewhere; both with the loss.

    Figures that a model logs with `prog_bar=True` are shown, or else the loss that its training step returns.
    """

    def __init__(self, seconds_between_lines: float = SECONDS_BETWEEN_LINES) -> None:
        super().__init__()
        self.seconds_between_lines = seconds_between_lines
        self._bar: tqdm | None = None
        self._enabled = True
        self._loss: Tensor | None = None
        self._line_time = 0.0
        self._line_batch = 0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._total = total_batches(trainer)
        self._line_time, self._line_batch = time.monotonic(), trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if self._enabled and trainer.is_global_zero and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total,
                initial=self._line_batch,
                unit="batch",
                dynamic_ncols=True,
                mininterval=0.3,
                smoothing=0.05,
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self._loss = loss if isinstance(loss, Tensor) else None
        if not self._enabled or not trainer.is_global_zero:
            return
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if self._bar is not None:
            # The figures are read from the device only when the bar is drawn: reading waits for the device.
            if self._bar.update(done - self._bar.n):
                self._bar.set_description(f"epoch {trainer.current_epoch}", refresh=False)
                self._bar.set_postfix(self._figures(trainer, pl_module), refresh=False)
            return
        now = time.monotonic()
        if now - self._line_time >= self.seconds_between_lines:
            rate = (done - self._line_batch) / (now - self._line_time)
            figures = "  ".join(f"{name} {value}" for name, value in self._figures(trainer, pl_module).items())
            left = f"  {_clock((self._total - done) / rate)} left" if self._total else ""
            of = f"/{self._total}" if self._total else ""
            epoch = trainer.current_epoch
            logger.info(
                "%-11s epoch %d, batch %d%s  %s  %.2f batches/s%s", "training", epoch, done, of, figures, rate, left
            )
            self._line_time, self._line_batch = now, done

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_time = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        figures = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val")}
        text = ", ".join(f"{name} {float(value):.4g}" for name, value in sorted(figures.items()))
        seconds = time.monotonic() - self._validation_time
        logger.info("%-11s step %d: %s (%.1f s)", "validation", trainer.global_step, text or "nothing logged", seconds)

    def _figures(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, str]:
        figures = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
        figures = {
            name: value for name, value in figures.items() if not name.startswith("val") and not name.endswith("_epoch")
        }
        if not any("loss" in name for name in figures) and self._loss is not None:
            figures = {"loss": self._loss.item(), **figures}
        return {name.removesuffix("_step"): f"{float(value):.4g}" for name, value in figures.items()}

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def total_batches(trainer: pl.Trainer) -> int | None:
    """Training batches of the whole run, None where nobody knows."""
    an_epoch = trainer.num_training_batches
    totals = []
    if trainer.max_epochs not in (None, -1) and math.isfinite(an_epoch):
        totals.append(int(trainer.max_epochs * an_epoch))
    if trainer.max_steps != -1:
        accumulation = (
            getattr(trainer.lightning_module, "accumulate_grad_batches", None) or trainer.accumulate_grad_batches
        )
        totals.append(trainer.max_steps * accumulation)
    return min(totals, default=None)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class RunReport(pl.Callback):
    """What training starts with and how it ended, from the objects themselves: data, parameters, batch, learning rate.

    expected_rate: the learning rate that the command line and the configs give; a resumed optimizer may have another.
    """

    def __init__(self, expected_rate: float | None = None, rule: str = "") -> None:
        super().__init__()
        self.expected_rate, self.rule = expected_rate, rule

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start, self._first_step = time.monotonic(), trainer.global_step
        if not trainer.is_global_zero:
            return
        batches = trainer.num_training_batches
        an_epoch = f"{batches} batches an epoch" if math.isfinite(batches) else "a stream"
        validation = sum(count for count in trainer.num_val_batches if math.isfinite(count))
        logger.info("%-11s %s, %d of validation", "data", an_epoch, validation)
        logger.info("%-11s %s", "model", parameters_line(pl_module))
        if self.rule:
            logger.info("%-11s %s", "batch", self.rule)
        for position, optimizer in enumerate(trainer.optimizers):
            rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
            now = [float(group["lr"]) for group in optimizer.param_groups]
            tensors = sum(len(group["params"]) for group in optimizer.param_groups)
            scheduled = "" if now == rates else f", scheduled: {now[0]:.3e} at step {trainer.global_step}"
            name = type(optimizer).__name__ + (
                f" ({position + 1} of {len(trainer.optimizers)})" if len(trainer.optimizers) > 1 else ""
            )
            logger.info("%-11s %s, learning rate %.3e%s, %d tensors", "optimizer", name, rates[0], scheduled, tensors)
            if (
                self.expected_rate is not None
                and trainer.ckpt_path
                and not math.isclose(rates[0], self.expected_rate, rel_tol=1e-6)
            ):
                logger.warning(
                    "%-11s the checkpoint's learning rate %.3e goes on, not the configs' %.3e",
                    "optimizer",
                    rates[0],
                    self.expected_rate,
                )
        if trainer.ckpt_path:
            logger.info(
                "%-11s step %d, epoch %d, from %s",
                "resumed",
                trainer.global_step,
                trainer.current_epoch,
                trainer.ckpt_path,
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            seconds, steps = time.monotonic() - self._start, trainer.global_step - self._first_step
            rate = f", {steps / seconds:.2f} a second" if seconds > 0 and steps else ""
            logger.info(
                "%-11s %d steps in %s%s; now at step %d", "trained", steps, _clock(seconds), rate, trainer.global_step
            )


def parameters_line(module: nn.Module) -> str:
    """A model's class, its number of parameters and how many of them are trained."""
    total = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters() if torch.is_floating_point(p)})
    return f"{type(module).__name__}, {_count(total)} parameters, {_count(trained)} of them trained, {'/'.join(dtypes)}"


def _count(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 10_000 else f"{number:,}"
