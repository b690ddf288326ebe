"""Save or stop a run on a signal, at the end of a step and on all ranks."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)

SAVE, TERMINATE, INTERRUPT = 1, 2, 3  # requests; the ranks agree on the largest
_EXITS = {TERMINATE: ("SIGTERM", 143), INTERRUPT: ("Ctrl-C", 130)}  # exit codes are 128 + the signal's number
_WORKER_SECONDS = 60  # for which a data worker continues after SIGTERM, so that the step can finish


class Stopped(BaseException):
    """Raised when a signal stops training, after its state was saved; `exit_code` is that of the process.

    A BaseException, so that handlers of errors do not catch it.
    """

    def __init__(self, reason: str, exit_code: int, checkpoint: Path | None) -> None:
        super().__init__(reason)
        self.reason, self.exit_code, self.checkpoint = reason, exit_code, checkpoint


class SignalCallback(pl.Callback):
    """SIGUSR1 saves `last.ckpt`; SIGTERM and Ctrl-C save it and stop, a second Ctrl-C at once; SIGUSR2 debugs.

    They act after an optimizer step, so that no accumulated gradient is lost, or between two validation batches.
    path: file of the saved state; None saves nothing.
    """

    def __init__(self, path: str | Path | None) -> None:
        super().__init__()
        self.path = None if path is None else Path(path)
        self._wanted = 0
        self._pid = os.getpid()
        self._step_before = -1
        self._previous: dict[int, Any] = {}
        self._group: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._install()  # and again after Lightning has set its own handlers
        process = trainer.strategy.process_dataloader

        def process_dataloader(dataloader: object) -> object:
            return process(outlive_signals(dataloader))

        trainer.strategy.process_dataloader = process_dataloader  # type: ignore[method-assign]  # for this run only

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._install()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._install()
        self._step_before = trainer.global_step
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")  # on the CPU: agreeing never waits for a GPU

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.restore()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        stepped = trainer.global_step != self._step_before
        self._step_before = trainer.global_step
        if stepped:
            self._act(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == "fit":
            self._act(trainer)

    def _act(self, trainer: pl.Trainer) -> None:
        wanted = self._wanted
        if self._group is not None:
            largest = torch.tensor([wanted])
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self._group)
            wanted = int(largest)
        if not wanted:
            return
        saved = self._save(trainer)  # the flag stays set, so that a second Ctrl-C during a long save ends the process
        if wanted in _EXITS:
            raise Stopped(*_EXITS[wanted], saved)
        if self._wanted == SAVE:
            self._wanted = 0

    def _save(self, trainer: pl.Trainer) -> Path | None:
        if self.path is None or trainer.sanity_checking or getattr(trainer, "fast_dev_run", False):
            return None
        trainer.save_checkpoint(self.path)
        if trainer.is_global_zero:
            logger.info("%-11s step %d -> %s", "checkpoint", trainer.global_step, self.path)
        return self.path

    def _install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        handlers = {signal.SIGINT: self._on_interrupt, signal.SIGTERM: self._on_request}
        if os.name != "nt":
            handlers |= {signal.SIGUSR1: self._on_request, signal.SIGUSR2: self._on_debug}
        for number, handler in handlers.items():
            previous = signal.signal(number, handler)
            self._previous.setdefault(number, previous)

    def restore(self) -> None:
        """Restore the former handlers. For the caller: after an exception Lightning installs ours again."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._previous.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked child
        if self._wanted == INTERRUPT:
            os.write(2, b"\nstopped immediately; nothing was saved since the last checkpoint\n")
            os._exit(_EXITS[INTERRUPT][1])
        self._wanted = INTERRUPT
        os.write(2, b"\nCtrl-C: saving at the end of this step; press again to stop immediately\n")

    def _on_request(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:
            self._wanted = max(self._wanted, TERMINATE if number == signal.SIGTERM else SAVE)

    def _on_debug(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:
            breakpoint()


def outlive_signals(loader: Any) -> Any:
    """Let a loader's workers survive signals to the whole job: the main process needs their batches to finish."""
    if isinstance(loader, DataLoader) and loader.num_workers > 0 and os.name != "nt":
        loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)
    return loader


def _start_worker(worker_init_fn: Callable[[int], None] | None, worker_id: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # An alarm, not SIG_IGN: the main process waits for its workers, so one that hangs must end.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_WORKER_SECONDS))
    if worker_init_fn is not None:
        worker_init_fn(worker_id)
