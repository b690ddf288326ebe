"""Checkpoints of a run: `last.ckpt` (the newest state), its copy, the best of a metric, `crash.ckpt` of an error."""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ldm.atomic import atomic_file
from ldm.checkpoint.formats import part_files
from ldm.cli import Stopped
from ldm.config.instantiate import ConfigError
from ldm.config.suggest import closest
from ldm.paths import shown_path

if sys.platform == "linux":
    import fcntl

logger = logging.getLogger(__name__)

MIB = 2**20
_NAMES_SHOWN = 20  # of metrics, in a message
_FICLONE = 0x40049409  # ioctl of Linux: share the blocks of another file until one of them changes


class CheckpointPolicy(ModelCheckpoint):
    """Lightning's ModelCheckpoint, with a `last.ckpt` that is always the newest state and a second copy of it.

    Lightning updates `last.ckpt` only with a best-of checkpoint, ranks a state by the metric of an earlier one, stops
    the run if the monitored metric is not logged, and may save between accumulated gradients. Here `last.ckpt` is
    updated after every validation (or epoch, without validation) and every `every_n_train_steps`. Only a state whose
    metric was measured at its step is ranked; a value that is not finite never is. The newest state is in two files
    that share no inode: `last.ckpt` and the best-of file of the same step or else `last-copy.ckpt` (not with
    `copy_last: false`). In a sharded run these are indices of the same parts, and `last-copy.ckpt` is the state before.
    """

    def __init__(self, *args: Any, copy_last: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.copy_last = copy_last
        self._validated = self._ranked = -1  # steps of the last validation and of the last ranking
        self._of_validation: set[str] = set()  # names of the metrics that validations log
        self._measured: set[str] = set()  # those of the last validation: a callback may not log in each
        self._ranked_before: set[str] = set()  # best-of files before the ranking that is being saved
        self._replaced: list[str] = []  # best-of files that the loaded state's save was about to delete
        self._logged: set[str] = set()
        self._tidy = False  # True once what an interrupted save left to do is done

    @property
    def last_path(self) -> Path:
        return Path(str(self.dirpath), self.CHECKPOINT_NAME_LAST + self.FILE_EXTENSION)

    @property
    def copy_path(self) -> Path:
        return self.last_path.with_name(f"{self.CHECKPOINT_NAME_LAST}-copy{self.FILE_EXTENSION}")

    @property
    def best_files(self) -> set[str]:
        return set(self.best_k_models) or ({self.best_model_path} if self.best_model_path else set())

    def state_dict(self) -> dict[str, Any]:
        more = {"validation_metrics": sorted(self._of_validation), "ranked_step": self._ranked}
        return {**super().state_dict(), **more, "replaced": sorted(self._ranked_before - self.best_files)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = _relocated(state_dict, str(self.dirpath))
        super().load_state_dict(state_dict)
        if self.dirpath == state_dict.get("dirpath"):
            self._of_validation = set(state_dict.get("validation_metrics", ()))
            self._ranked = state_dict.get("ranked_step", -1)
            self._replaced = state_dict.get("replaced", [])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Loaded or initial weights are not saved again, except once the validation that was due has run.
        unfinished = getattr(trainer.fit_loop, "unfinished", False)
        self._last_global_step_saved = -1 if unfinished else trainer.global_step
        self._step_before, self._last_time_checked = trainer.global_step, time.monotonic()
        self._finish_interrupted_save(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish_interrupted_save(trainer)  # if there was nothing left to train

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._step_before = trainer.global_step != self._step_before, trainer.global_step
        if not stepped:
            return
        every, interval = self._every_n_train_steps, self._train_time_interval
        due = every > 0 and trainer.global_step % every == 0
        if interval is not None:
            now, before = time.monotonic(), self._last_time_checked
            due = bool(trainer.strategy.broadcast(before is None or now - before >= interval.total_seconds()))
        if due:
            self._last_time_checked = time.monotonic()
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._should_save_on_train_epoch_end(trainer):
            self._save(trainer, self._ranks_epoch(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validated = trainer.global_step
        self._measured = set(trainer._logger_connector.metrics["callback"])  # callback_metrics has older values too
        self._of_validation |= self._measured
        if not self._should_save_on_train_epoch_end(trainer):
            self._save(trainer, self._ranks_epoch(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer, best=False)
        if trainer.is_global_zero and not self._idle(trainer):
            self._log_space()

    @staticmethod
    def _idle(trainer: pl.Trainer) -> bool:
        fast = getattr(trainer, "fast_dev_run", False)  # Lightning does not declare it
        return bool(fast) or trainer.state.fn != "fit" or trainer.sanity_checking

    def _ranks_epoch(self, trainer: pl.Trainer) -> bool:
        if self._every_n_epochs >= 1:
            return (trainer.current_epoch + 1) % self._every_n_epochs == 0
        return self.monitor is not None

    def _save(self, trainer: pl.Trainer, best: bool = True) -> None:
        if self._idle(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        best = best and self.save_top_k != 0 and self._ranked != trainer.global_step
        if best and self._is_fresh(trainer, candidates):
            self._ranked, self._ranked_before = trainer.global_step, self.best_files
            self._save_topk_checkpoint(trainer, candidates)
            self._ranked_before = set()
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self.save_last_state(trainer)

    def _is_fresh(self, trainer: pl.Trainer, candidates: dict[str, Tensor]) -> bool:
        """True without a monitor, or if its value is finite and of this step. The ranks agree: they use rank 0's."""
        if self.monitor is None:
            return True
        measured = self._validated == trainer.global_step and self.monitor in self._measured
        stale = self.monitor in self._of_validation and not measured
        value = None if stale or self.monitor not in candidates else float(candidates[self.monitor])
        value = trainer.strategy.broadcast(value)
        if value is None:
            # Without any validation yet, the metric may be logged by one to come.
            if not stale and self._validated == trainer.global_step:
                names = sorted(set(candidates) - {"epoch", "step"})
                near = closest(self.monitor, names)
                problem = f"the monitor {self.monitor!r} is not logged, so only last.ckpt is kept"
                logged = f"{', '.join(names[:_NAMES_SHOWN])}{', ...' if len(names) > _NAMES_SHOWN else ''}"
                advice = f"; did you mean {near!r}?" if near else ""
                self._log_once("missing", f"{problem}; logged are {logged or 'no metrics'}{advice}")
            return False
        candidates[self.monitor] = torch.tensor(value)
        if not math.isfinite(value):
            step = trainer.global_step
            self._log_once("not finite", f"{self.monitor} is {value:g} at step {step}: such states are not ranked")
            return False
        return True

    def _log_once(self, key: str, text: str, level: int = logging.WARNING) -> None:
        if key not in self._logged:
            self._logged.add(key)
            logger.log(level, "%-11s %s", "checkpoint", text)

    def save_last_state(self, trainer: pl.Trainer) -> Path:
        """Write `last.ckpt`, and `last-copy.ckpt` unless `copy_last` is false -> the path of the former."""
        self._write_last(trainer)
        if self.copy_last and trainer.is_global_zero and not is_sharded(trainer):
            copy_file(self.last_path, self.copy_path)
        return self.last_path

    def _write_last(self, trainer: pl.Trainer) -> None:
        if self.copy_last and trainer.is_global_zero and is_sharded(trainer):
            copy_file(self.last_path, self.copy_path)
        self.last_model_path = str(self.last_path)
        self._write(trainer, self.last_path)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        """Write a best-of file: `last.ckpt` first, then an independent copy of it under the file's name.

        So a kill at any moment leaves a `last.ckpt` that knows which files belong to it.
        """
        if not self.save_last:
            self._write(trainer, Path(filepath))
            return
        self._write_last(trainer)
        copies = not is_sharded(trainer) or Path(filepath).parent == self.last_path.parent  # where its parts are
        copied = copies and trainer.is_global_zero and copy_file(self.last_path, Path(filepath))
        if not trainer.strategy.broadcast(copied):
            self._write(trainer, Path(filepath))
        if trainer.is_global_zero and not is_sharded(trainer):
            self.copy_path.unlink(missing_ok=True)  # the best-of file is the second copy now

    def _write(self, trainer: pl.Trainer, path: Path) -> None:
        start = time.monotonic()
        super()._save_checkpoint(trainer, str(path))
        if not trainer.is_global_zero:
            return
        write_adapter_files = getattr(trainer.lightning_module, "write_adapter_files", None)
        if path == self.last_path and callable(write_adapter_files):
            write_adapter_files(path.parent)
        seconds, step = time.monotonic() - start, trainer.global_step
        parts = part_files(path) if is_sharded(trainer) and path.is_file() else []
        size = sum(file.stat().st_size for file in (path, *parts)) / MIB if path.is_file() else None
        text = "a folder" if size is None else f"{size:.1f} MiB"
        logger.info("%-11s step %d -> %s (%s in %.1f s)", "checkpoint", step, shown_path(path), text, seconds)
        if size is not None and self.save_top_k >= 0:
            newest, best = (1 + self.copy_last if self.save_last else 0), self.save_top_k
            kept = f"the newest state in {newest} files and {best} best of {self.monitor or 'an epoch'}"
            if str(self.monitor).startswith("val") and not _validates(trainer):
                kept, best = f"the newest state in {newest} files; no validation, so no best of {self.monitor}", 0
            self._log_once("space", f"keeps {kept}: at most {(newest + best) * size:.1f} MiB", logging.INFO)

    # ------------------------------------------------------------------------------------------------- files of a run

    def _finish_interrupted_save(self, trainer: pl.Trainer) -> None:
        """Do what a save that was killed left to do: write the best-of file of its state, delete what it replaced."""
        resumed, step = Path(str(trainer.ckpt_path)), trainer.global_step
        if self._tidy or not trainer.is_global_zero or resumed not in (self.last_path, self.copy_path):
            return  # done, or an older state
        self._tidy = True
        own = next(reversed(self.best_k_models), self.best_model_path) if self._ranked == step else ""
        for name in sorted(self.best_files):
            if Path(name).exists():
                continue
            if name == own:
                copy_file(resumed, Path(name))
            else:
                self.best_k_models.pop(name, None)
        if resumed == self.last_path and Path(own).is_file() and not is_sharded(trainer):
            self.copy_path.unlink(missing_ok=True)  # the best-of file is the second copy
        for path in map(Path, self._replaced):
            if path.parent == Path(str(self.dirpath)) and str(path) not in self.best_files and path.is_file():
                path.unlink()
                logger.info("%-11s removed %s: it is no longer among the best", "checkpoint", shown_path(path))

    def _log_space(self) -> None:
        files = sorted(Path(str(self.dirpath)).rglob("*.ckpt"))
        size = sum(path.stat().st_size for path in files) / MIB
        names = ", ".join(path.name for path in files[:8]) + (", ..." if len(files) > 8 else "")
        if files:
            logger.info("%-11s %.1f MiB in %s: %s", "checkpoint", size, shown_path(Path(str(self.dirpath))), names)


def _relocated(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the state of a policy with the paths of a run directory that was moved; unchanged for another run's."""
    before, best = str(state.get("dirpath")), state.get("best_k_models") or {}

    def moved(name: str | None) -> str:
        return str(Path(folder, Path(name).relative_to(before))) if name and Path(name).is_relative_to(before) else ""

    names = {name: moved(name) for name in (*best, state.get("best_model_path")) if name}
    if before == folder or not any(path and Path(path).exists() for path in names.values()):
        return state
    single = {key: moved(state.get(key)) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
    replaced = [path for name in state.get("replaced", ()) if (path := moved(name))]
    best = {names[name]: value for name, value in best.items() if names[name]}
    return {**state, **single, "dirpath": folder, "best_k_models": best, "replaced": replaced}


def is_sharded(trainer: pl.Trainer) -> bool:
    """True if the ranks share the weights; then checkpoints are indices, whose parts never change and may be common."""
    return isinstance(trainer.lightning_module, FSDPModule)


def _validates(trainer: pl.Trainer) -> bool:
    """True if the run has validation batches, or if they are not known yet."""
    known = trainer.val_dataloaders is not None
    return trainer.enable_validation and (not known or any(trainer.num_val_batches))


def copy_file(source: Path, target: Path) -> bool:
    """Replace `target` by an independent copy of a finished file; return False for a folder.

    The copy shares blocks where the file system can (reflink): it costs neither time nor space there.
    """
    if not source.is_file():
        return False
    with (
        atomic_file(target, source.stat().st_size) as temporary,
        open(source, "rb") as file,
        open(temporary, "wb") as copy,
    ):
        try:
            if sys.platform != "linux":
                raise OSError
            fcntl.ioctl(copy.fileno(), _FICLONE, file.fileno())
        except OSError:
            shutil.copyfileobj(file, copy, 16 * MIB)
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
        if is_sharded(trainer):
            logger.error("%-11s a sharded state at an error cannot be saved; last.ckpt is intact", "checkpoint")
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
