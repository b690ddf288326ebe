"""Console output of a run: one log line per event with the time, one line per warning, and its errors."""

from __future__ import annotations

import logging
import os
import pdb
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ldm.cli import EXIT_USAGE, TerminalHandler, one_line

EXIT_FAILED = 1

# Lightning's warnings about what this package intends or handles itself.
_NOISE = (
    ".*does not have many workers.*",
    ".*but have no `val_dataloader`.*",
    ".*but have no logger configured.*",
    ".*is smaller than the logging interval.*",
    ".*exists and is not empty.*",
    ".*in eval mode at the start of training.*",
    ".*ModelCheckpoint with manual optimization.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*srun.*command is available.*",
    ".*GPU available but not used.*",
    ".*`max_epochs` was not set.*",
    ".*The dirpath has changed from.*",
    ".*Please use the new API settings to control TF32.*",
    ".*The `srun` command.*",
    ".*AMP with fp16 is not supported on CPU.*",
    ".*lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`.*",  # a false alarm after a resume
    ".*val_dataloader.*has `shuffle=True`.*",
    ".*Grad strides do not match bucket view strides.*",  # of 1x1 convolutions; DistributedDataParallel copies them
    ".*It is recommended to use `self.log.*sync_dist=True.*",  # training metrics are those of the first rank
)


class TrainingFailed(Exception):
    """Raised from the exception that ended training after it had begun."""


def is_main_process() -> bool:
    """True in a single process and in the first of several ranks, from the launcher's environment variables."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


@contextmanager
def console(debug: bool = False) -> Iterator[None]:
    """Log this package's events, and warnings as one line each, to stderr; restore the logging state afterwards.

    A line that the terminal would get from `ldm.cli.run_command` too is logged once.
    """
    handler = TerminalHandler(logging.DEBUG if is_main_process() else logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    package = logging.getLogger("ldm")
    level, propagate = package.level, package.propagate
    package.addHandler(handler)
    package.setLevel(logging.DEBUG if debug else logging.INFO)
    twice = any(isinstance(each, TerminalHandler) for each in logging.getLogger().handlers)
    package.propagate = propagate and not twice
    with warnings.catch_warnings():
        if not debug:
            for message in _NOISE:
                warnings.filterwarnings("ignore", message=message)
            for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", category, append=True)
            warnings.showwarning = _warn_in_one_line  # restored by catch_warnings
        try:
            yield
        finally:
            package.removeHandler(handler)
            package.setLevel(level)
            package.propagate = propagate


def report_error(error: Exception, debug: bool) -> int:
    """Print an error that ended a run and return the exit code.

    One line for errors that the user can fix; a traceback for other exceptions, and with `debug`.
    """
    failed = isinstance(error, TrainingFailed)
    cause = error.__cause__ if failed and error.__cause__ is not None else error
    ours = type(cause).__module__.startswith("ldm.")  # errors of this package, whose messages are complete
    plain = ours if failed else isinstance(cause, ValueError | OSError | ImportError)
    if debug or not plain:
        traceback.print_exception(cause)
    notes = "".join(f", {note}" for note in getattr(cause, "__notes__", [])[:1])
    hint = "" if debug or not plain or ours else " (--debug shows where)"
    print(f"error: {one_line(cause)}{notes}{hint}", file=sys.stderr)
    code = EXIT_USAGE if plain and not failed else EXIT_FAILED
    if debug and code == EXIT_FAILED and sys.stdin.isatty():
        pdb.post_mortem(cause.__traceback__)
    return code


def _warn_in_one_line(message: Warning | str, *where: Any, **more: Any) -> None:
    logging.getLogger("ldm.warnings").warning("%-11s %s", "warning", " ".join(str(message).split()))
