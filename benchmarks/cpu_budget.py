"""A training callback that spends processor time instead of steps, so that runs of different costs can be compared."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ldm.atomic import save_text


class CPUBudget(pl.Callback):
    """Save FOLDER/<k>.ckpt after `seconds[k]` CPU seconds of training, and stop after the last.

    The clock counts all threads of the process, and stands still while a checkpoint is written or the process is
    paused. FOLDER/marks.json holds the step and the CPU seconds of each checkpoint.
    """

    def __init__(self, folder: str, seconds: Sequence[float]) -> None:
        super().__init__()
        self.folder, self.seconds = Path(folder), sorted(seconds)
        self.marks: list[dict[str, float]] = []
        self._start = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        spent = time.process_time() - self._start
        while len(self.marks) < len(self.seconds) and spent >= self.seconds[len(self.marks)]:
            trainer.save_checkpoint(self.folder / f"{len(self.marks)}.ckpt")
            self.marks.append({"step": trainer.global_step, "cpu_seconds": round(spent, 3)})
        save_text(self.folder / "marks.json", json.dumps(self.marks))
        trainer.should_stop = len(self.marks) == len(self.seconds)
        self._start = time.process_time() - spent
