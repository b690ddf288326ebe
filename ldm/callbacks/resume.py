"""Two corrections of Lightning 2.6's resume, without which a run that resumes twice may repeat or skip an epoch."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loops.fit_loop import _FitLoop


class ExactResume(pl.Callback):
    """Let a run stop and resume at any step, any number of times.

    A state saved at the last batch of an epoch is written as one saved at the end of that epoch, because Lightning's
    loops resume from the former with counters that are one off. In both cases that epoch's validation is skipped.
    With `max_steps`, Lightning also takes a finished epoch for an unfinished one, which `_ExactFitLoop` corrects.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if type(trainer.fit_loop) is _FitLoop:
            trainer.fit_loop.__class__ = _ExactFitLoop

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loop = trainer.fit_loop
        # Lightning annotates only some of the counters.
        batches: Any = loop.epoch_loop.batch_progress
        epochs: Any = loop.epoch_progress.current
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
    """Lightning's loop, but only an unfinished epoch is restarted, with or without `max_steps`."""

    @property
    def restarting(self) -> bool:
        return self._restarting

    @restarting.setter
    def restarting(self, restarting: bool) -> None:
        epochs: Any = self.epoch_progress.current
        self._restarting = restarting and not epochs.ready == epochs.started == epochs.processed
        self.epoch_loop.restarting = self._restarting
