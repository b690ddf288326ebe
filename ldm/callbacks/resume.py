"""Two repairs of how Lightning 2.6 resumes, without which the second resume of a run may repeat or skip an epoch."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loops.fit_loop import _FitLoop
from pytorch_lightning.loops.loop import _Loop


class ExactResume(pl.Callback):
    """Lets a run be stopped and resumed at any step, any number of times.

    A state that is saved at the last batch of an epoch is written as one saved at that epoch's end: Lightning's loops resume from
    the former with counters that are one off. What that epoch's end would still have brought is its validation, which such a
    resume leaves out either way. And where `max_steps` is set, Lightning takes a finished epoch for one in progress.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if type(trainer.fit_loop) is _FitLoop:
            trainer.fit_loop.__class__ = _ExactFitLoop

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loop = trainer.fit_loop
        batches, epochs = loop.epoch_loop.batch_progress, loop.epoch_progress.current
        in_batch_end = batches.current.ready == batches.current.processed == batches.current.completed + 1
        in_epoch = epochs.ready == epochs.started == epochs.processed + 1
        if not (trainer.state.fn == "fit" and batches.is_last_batch and in_batch_end and in_epoch):
            return
        state = checkpoint["loops"]["fit_loop"]
        for scope in ("total", "current"):
            state["epoch_progress"][scope]["processed"] += 1
            state["epoch_loop.batch_progress"][scope]["completed"] += 1
        state["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


class _ExactFitLoop(_FitLoop):
    """Lightning's loop, but that an epoch is restarted only where it was left unfinished, with `max_steps` as without."""

    @_Loop.restarting.setter
    def restarting(self, restarting: bool) -> None:
        epochs = self.epoch_progress.current
        unfinished = not epochs.ready == epochs.started == epochs.processed
        _Loop.restarting.fset(self, restarting and unfinished)
