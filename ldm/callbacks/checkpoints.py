"""Checkpoints of a run: `last.ckpt` (always the newest), the best few of a metric, and `crash.ckpt` after an error."""

from __future__ import annotations

import logging
import os
import time
import uuid
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from ldm.callbacks.signals import Stopped
from ldm.config.instantiate import ConfigError

logger = logging.getLogger(__name__)


class CheckpointPolicy(ModelCheckpoint):
    """Lightning's ModelCheckpoint, with a `last.ckpt` that is always the newest state.

    Lightning updates `last.ckpt` only with a best-of checkpoint, stops the run if the monitored metric is not logged,
    writes the same state twice, and may save between accumulated gradients. Here `last.ckpt` is updated after every
    validation (or epoch, without validation) and every `every_n_train_steps`, and is a hard link to the best-of file
    of the same step if there is one.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step  # do not save loaded or initial weights again
        self._step_before = trainer.global_step
        self._warned = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._step_before = trainer.global_step != self._step_before, trainer.global_step
        if not stepped:
            return
        every = self._every_n_train_steps
        if self._train_time_interval is not None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif every > 0 and trainer.global_step % every == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._should_save_on_train_epoch_end(trainer):
            self._save_epoch(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._should_save_on_train_epoch_end(trainer):
            self._save_epoch(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer, best=False)

    def _save_epoch(self, trainer: pl.Trainer) -> None:
        self._save(trainer, self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0)

    def _save(self, trainer: pl.Trainer, best: bool = True) -> None:
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if best:
            self._save_topk_checkpoint(trainer, candidates)
        if self.save_last:
            self._save_last_checkpoint(trainer, candidates)

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.monitor is not None and self.monitor not in monitor_candidates:
            if not self._warned and self.save_top_k != 0:
                self._warned = True
                logger.warning("%-11s %r is not logged, so only last.ckpt is kept", "checkpoint", self.monitor)
            return
        super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        path = os.path.join(str(self.dirpath), self.CHECKPOINT_NAME_LAST + self.FILE_EXTENSION)
        twin = self._last_checkpoint_saved if self._last_global_step_saved == trainer.global_step else ""
        self.last_model_path = path
        shared = trainer.is_global_zero and bool(twin) and twin != path and share_file(twin, path)
        if not trainer.strategy.broadcast(shared):
            self._save_checkpoint(trainer, path)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        start = time.monotonic()
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            path, seconds = Path(filepath), time.monotonic() - start
            size = f"{path.stat().st_size / 2**20:.1f} MiB" if path.is_file() else "a folder"
            shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
            logger.info("%-11s step %d -> %s (%s in %.1f s)", "checkpoint", trainer.global_step, shown, size, seconds)


def share_file(source: str | Path, target: str | Path) -> bool:
    """Make `target` a hard link to a finished file, replacing it; return False if the file system has no hard links."""
    temporary = Path(target).with_name(f".{Path(target).name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True


class CrashCheckpoint(pl.Callback):
    """Save `crash.ckpt` if an exception ends training; `last.ckpt` and the exception do not change."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.started = False

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.started = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        no_crash = isinstance(exception, ConfigError | Stopped | KeyboardInterrupt | SystemExit)
        if no_crash or not self.started or getattr(trainer, "fast_dev_run", False):
            return
        try:
            # Not trainer.save_checkpoint: it waits for the other ranks, which may continue without this one.
            state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            trainer.strategy.save_checkpoint(state, self.path)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            logger.error("%-11s could not save the state at the error: %s", "checkpoint", reason)
            return
        if trainer.is_global_zero:
            logger.error("%-11s the state at the error is in %s", "checkpoint", self.path)
