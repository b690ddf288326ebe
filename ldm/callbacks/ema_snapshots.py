"""Snapshots of power-function averages, from which other widths are reconstructed after training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.distributed.tensor import DTensor

from ldm.callbacks.checkpoints import MIB
from ldm.checkpoint.snapshots import Profile, find_snapshots, snapshot_interval, write_snapshot
from ldm.cli import one_line
from ldm.modules.ema import LitEma, PowerEma, average_name
from ldm.paths import shown_path

logger = logging.getLogger(__name__)


class EMASnapshots(pl.Callback):
    """Write a snapshot every `every` optimizer steps, and keep at most `limit` of them, evenly spaced.

    A snapshot is written before the checkpoint of its step; an error of its file ends no run. A resumed run deletes
    those after its step, which it will write again, so that their set is that of an uninterrupted run.
    """

    def __init__(self, folder: Path, every: int, limit: int) -> None:
        super().__init__()
        self.folder, self.every, self.limit = folder, every, limit
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        found = find_snapshots(self.folder)
        missing = self._step not in {snapshot.step for snapshot in found}
        for snapshot in found if trainer.is_global_zero else ():
            if snapshot.step > self._step:
                snapshot.path.unlink()
        if self._step and trainer.strategy.broadcast(missing):
            self._write(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if stepped:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = find_snapshots(self.folder) if trainer.is_global_zero else []
        if found:
            size = sum(snapshot.path.stat().st_size for snapshot in found) / MIB
            text = "%d of averages, %.1f MiB, in %s; scripts/posthoc_ema.py combines them"
            logger.info(f"%-11s {text}", "snapshots", len(found), size, shown_path(self.folder))

    def _write(self, trainer: pl.Trainer, module: Any) -> None:
        step, interval = self._step, snapshot_interval(self._step, self.every, self.limit)
        if step % interval:
            return
        model_ema: LitEma = module.model_ema
        powers = (average for average in model_ema.all_averages() if isinstance(average, PowerEma))
        averages = {average_name("sigma_rel", average.width): average for average in powers}
        shadows = {name: _whole_shadows(average) for name, average in averages.items()}  # all ranks meet here
        if not trainer.is_global_zero:
            return
        profiles = {name: Profile(average.width, average.time) for name, average in averages.items()}
        try:
            path = write_snapshot(self.folder, step, shadows, profiles)
            found = find_snapshots(self.folder)
            if len(found) > self.limit:  # not before: those of another `every` may lie between
                for snapshot in (each for each in found if each.step % interval):
                    snapshot.path.unlink()
        except OSError as error:
            logger.warning("%-11s step %d: failed, training continues: %s", "snapshots", step, one_line(error))
            return
        if step == self.every:
            size = path.stat().st_size / MIB
            logger.info("%-11s every %d steps, at most %d of %.1f MiB", "snapshots", self.every, self.limit, size)


def _whole_shadows(average: LitEma) -> dict[str, Tensor]:
    """Return the averages of a model, gathered where a strategy shards them."""
    shadows = {name: average.get_buffer(name) for name in average.m_name2s_name.values()}
    return {name: shadow.full_tensor() if isinstance(shadow, DTensor) else shadow for name, shadow in shadows.items()}
