"""How a run talks: a line an event with the time, no progress bar torn apart, and no warnings that do not concern the user."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Lightning's remarks about what is intended here, or what this package takes care of.
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
    ".*lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`.*",  # a false alarm when the first steps follow a resume
    ".*val_dataloader.*has `shuffle=True`.*",
)
# Lightning's own loggers say at INFO what the lines of this package say better.
_CHATTY = ("pytorch_lightning", "lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric")


def is_main_process() -> bool:
    """Whether this is the one process, or the first rank of several, as their launchers say before Lightning knows."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


class _Lines(logging.Handler):
    """Log records as lines on stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr)


@contextmanager
def console(debug: bool = False) -> Iterator[None]:
    """Within it this package's log goes to stderr and warnings are one line each; afterwards all is as it was."""
    package = logging.getLogger("ldm")
    handler = _Lines()
    handler.setLevel(logging.DEBUG if is_main_process() else logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    level, show = package.level, warnings.showwarning
    other = logging.getLogger("__main__")
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    for each in (package, other):
        each.addHandler(handler)
        each.setLevel(logging.DEBUG if debug else logging.INFO)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.INFO if debug else logging.WARNING)
    with warnings.catch_warnings():
        if not debug:
            _quiet()
            warnings.showwarning = _one_line
        try:
            yield
        finally:
            warnings.showwarning = show
            for each in (package, other):
                each.removeHandler(handler)
            package.setLevel(level)
            for name, before in levels.items():
                logging.getLogger(name).setLevel(before)


def _quiet() -> None:
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category, append=True)


def _one_line(message: Warning | str, *where: Any, **more: Any) -> None:
    logging.getLogger("ldm.warnings").warning("%-11s %s", "warning", " ".join(str(message).split()))
