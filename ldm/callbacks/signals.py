"""Save or stop a run on a signal, at the end of a step and on all ranks."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from ldm.callbacks.checkpoints import CheckpointPolicy
from ldm.cli import STOPS, Stopped, handle_signals

logger = logging.getLogger(__name__)

SAVE = 1  # requests are ordered, and the ranks agree on the largest: SAVE, or 1 + the place of a signal in STOPS
INTERRUPT = 1 + len(STOPS)
_WORKER_SECONDS = 60  # for which a data worker continues after SIGTERM, so that the step can finish


class SignalCallback(pl.Callback):
    """SIGUSR1 saves `last.ckpt`; SIGTERM, SIGHUP and Ctrl-C save it and stop; a second Ctrl-C stops at once.

    They act after an optimizer step, so that no accumulated gradient is lost, or between two validation batches; an
    image log in progress is cut short. Before the first step there is nothing to save, and a single process stops at
    once. SIGUSR2 opens a debugger.
    path: file of the saved state; None saves nothing.
    """

    def __init__(self, path: str | Path | None) -> None:
        super().__init__()
        self.path = None if path is None else Path(path)
        self._wanted = 0
        self._pid = os.getpid()
        self._step_before = -1
        self._began = False
        self._previous: dict[int, Any] = {}
        self._group: Any = None
        self._single = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._install()
        # Lightning's own handlers would replace these, and stop without saving.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        self._single = trainer.world_size == 1
        if not self._single:
            self._group = torch.distributed.new_group(backend="gloo")  # on the CPU: agreeing never waits for a GPU
        process = trainer.strategy.process_dataloader

        def process_dataloader(dataloader: object) -> object:
            return process(outlive_signals(dataloader))

        trainer.strategy.process_dataloader = process_dataloader  # type: ignore[method-assign]  # for this run only

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step_before = trainer.global_step

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        end_workers()  # Lightning would wait five seconds for each of them, and the interpreter a minute

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.restore()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._began = True

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        stepped = trainer.global_step != self._step_before
        self._step_before = trainer.global_step
        if stepped:
            self._act(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == "fit":
            self._act(trainer)

    @contextmanager
    def cutting_short(self) -> Iterator[None]:
        """Within the scope, raise InterruptedError from the next call of a network once a stop is requested.

        Unlike an exception from the signal's handler, it cannot come while weights or generators are being restored.
        """

        def check(module: nn.Module, inputs: Any) -> None:
            if self._wanted > SAVE:
                raise InterruptedError("cut short by a signal")

        handle = nn.modules.module.register_module_forward_pre_hook(check)
        try:
            yield
        finally:
            handle.remove()

    def _act(self, trainer: pl.Trainer) -> None:
        wanted = self._wanted
        if self._group is not None:
            largest = torch.tensor([wanted])
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self._group)
            wanted = int(largest)
        if not wanted:
            return
        saved = self._save(trainer)  # the flag stays set, so that a second Ctrl-C during a long save ends the process
        if wanted > SAVE:
            raise Stopped(list(STOPS)[wanted - SAVE - 1], saved)
        if self._wanted == SAVE:
            self._wanted = 0

    def _save(self, trainer: pl.Trainer) -> Path | None:
        if self.path is None or trainer.sanity_checking or getattr(trainer, "fast_dev_run", False):
            return None
        policy = next((each for each in trainer.checkpoint_callbacks if isinstance(each, CheckpointPolicy)), None)
        if policy is not None and policy.save_last and policy.last_path == self.path and not policy.save_weights_only:
            return policy.save_last_state(trainer)
        trainer.save_checkpoint(self.path)
        if trainer.is_global_zero:
            logger.info("%-11s step %d -> %s", "checkpoint", trainer.global_step, self.path)
        return self.path

    def _install(self) -> None:
        handlers: dict[str, Any] = dict.fromkeys(STOPS, self._on_stop)
        handlers |= {"SIGUSR1": self._on_save, "SIGUSR2": self._on_debug}
        for number, previous in handle_signals(handlers).items():
            self._previous.setdefault(number, previous)

    def restore(self) -> None:
        """Restore the former handlers. For the caller: after an exception Lightning calls no teardown."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._previous.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked child
        name = signal.Signals(number).name
        if not self._began and self._single:
            raise Stopped(name)
        if name == "SIGINT" and self._wanted == INTERRUPT:
            os.write(2, b"\nstopped immediately; nothing was saved since the last checkpoint\n")
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(STOPS[name])
        self._wanted = max(self._wanted, SAVE + 1 + list(STOPS).index(name))
        if name == "SIGINT":
            os.write(2, b"\nCtrl-C: saving at the end of this step; press again to stop immediately\n")

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:
            self._wanted = max(self._wanted, SAVE)

    def _on_debug(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:
            breakpoint()


def end_workers(seconds: float = 2.0) -> None:
    """Kill the data workers of this process, its daemonic children, and wait for their end."""
    if threading.current_thread() is not threading.main_thread() or os.name == "nt":
        return
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises an error for a worker that was killed
    try:
        for worker in workers:
            worker.kill()
        deadline = time.monotonic() + seconds
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)


def outlive_signals(loader: Any) -> Any:
    """Let a loader's workers survive signals to the whole job: the main process needs their batches to finish."""
    if isinstance(loader, DataLoader) and loader.num_workers > 0 and os.name != "nt":
        loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)
    return loader


def _start_worker(worker_init_fn: Callable[[int], None] | None, worker_id: int) -> None:
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    # An alarm, not SIG_IGN: the main process waits for its workers, so one that hangs must end.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_WORKER_SECONDS))
    if worker_init_fn is not None:
        worker_init_fn(worker_id)
