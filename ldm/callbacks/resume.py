"""Corrections of Lightning 2.6's resume: whatever a run had left to do at its last step is done by the resumed one."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loops.fit_loop import _FitLoop
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop

KEY = "exact_resume"  # entry of checkpoints


class ExactResume(pl.Callback):
    """Let a run stop and resume at any step, any number of times.

    Lightning skips the validation and the end of the epoch (its hooks, its best checkpoint) that were due after the
    step of a checkpoint, takes a finished epoch for an unfinished one under `max_steps`, and one that `max_steps` cut
    short for a finished one. Here a state saved before or within a validation is written as one whose validation has
    just begun, which Lightning's loops then repeat, a state saved at the last batch of an epoch as one whose epoch has
    still to end, and a cut epoch as one that goes on. Checkpoints also hold the metrics of the last validation, for
    callbacks that look at them later.
    """

    def __init__(self) -> None:
        super().__init__()
        self._in_step = self._in_validation = False
        self._metrics: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if type(trainer.fit_loop) is _FitLoop:
            trainer.fit_loop.__class__ = _ExactFitLoop
            trainer.fit_loop.epoch_loop.__class__ = _ExactEpochLoop

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {name: torch.tensor(value) for name, value in self._metrics.items()}
        trainer._logger_connector._callback_metrics.update(metrics)

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._in_step = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._in_step, self._in_validation = False, not trainer.sanity_checking

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._in_validation = False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._in_step = False

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        saved = checkpoint.get(KEY) or {}
        self._metrics = dict(saved.get("metrics") or {})
        trainer.fit_loop.unfinished = bool(saved.get("unfinished"))  # type: ignore[attr-defined]  # of _ExactFitLoop

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit" or "loops" not in checkpoint:
            return
        loop = trainer.fit_loop.epoch_loop
        epochs: Any = trainer.fit_loop.epoch_progress.current  # Lightning annotates only some of the counters
        if (
            epochs.ready == epochs.processed
            and loop.batch_progress.current.ready
            and not loop._num_ready_batches_reached()
        ):
            _reopen_epoch(checkpoint)
        progress: Any = loop.batch_progress
        batch = progress.current
        at_batch_end = self._in_step and batch.ready == batch.processed == batch.completed + 1
        fetcher = trainer.fit_loop._data_fetcher
        validates = self._in_validation
        if at_batch_end and fetcher is not None:
            validates = loop._should_check_val_fx(fetcher)
        ends_epoch = at_batch_end and loop._is_training_done
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if isinstance(value, torch.Tensor) and value.numel() == 1
        }
        checkpoint[KEY] = {"unfinished": validates or ends_epoch, "metrics": metrics}
        if not (validates or ends_epoch):
            return
        state = checkpoint["loops"]["fit_loop"]
        if at_batch_end:
            for scope in ("total", "current"):
                state["epoch_loop.batch_progress"][scope]["completed"] += 1
        if validates:
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            saved = state["epoch_loop.val_loop.batch_progress"]
            saved.update(total=dict(begun), current=dict(begun), is_last_batch=False)
        elif not loop._should_accumulate():
            state["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def _reopen_epoch(checkpoint: dict[str, Any]) -> None:
    """Write an epoch that `max_steps` cut short, which Lightning counts as finished, as one that goes on."""
    for counts in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
        counts["processed"] = counts["completed"] = counts["ready"] - 1
    checkpoint["epoch"] = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]


class _ExactFitLoop(_FitLoop):
    """Lightning's loop, but an unfinished epoch is resumed, and only that, with or without `max_steps`."""

    unfinished = False  # a validation or the end of an epoch was due after the step of the checkpoint

    @property
    def restarting(self) -> bool:
        return self._restarting

    @restarting.setter
    def restarting(self, restarting: bool) -> None:
        epochs: Any = self.epoch_progress.current
        self._restarting = restarting and not epochs.ready == epochs.started == epochs.processed
        self.epoch_loop.restarting = self._restarting

    @property
    def done(self) -> bool:
        return not self.unfinished and super().done

    def on_advance_end(self) -> None:
        self.unfinished = False
        super().on_advance_end()
        self.epoch_loop.restarting = False  # it may have had nothing left to do, which Lightning does not expect
        self.epoch_loop.reset_restart_stage()


class _ExactEpochLoop(_TrainingEpochLoop):
    @property
    def _is_validation_done(self) -> bool:
        fetcher = self.trainer.fit_loop._data_fetcher
        # Resumed at the end of an epoch without validation, Lightning would train on a batch of the next one.
        return super()._is_validation_done or (fetcher is not None and not self._should_check_val_fx(fetcher))
