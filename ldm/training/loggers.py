"""Metrics of a run: one metrics.csv over all its starts, and loggers that never end training."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import _DummyExperiment
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor

from ldm.atomic import append_text, save_text

logger = logging.getLogger(__name__)

_MAX_PENDING = 100_000  # rows kept in memory while the file cannot be written
_METHODS = ("resume_at", "log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")


class MetricsFile(Logger):
    """Metrics as rows of a CSV file, written at once: `step` counts optimizer steps from 0, empty cells are unknown."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = []
        self._pending: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        return self.path.parent.name

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configs of the run directory hold them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._pending.append({**{name: float(value) for name, value in metrics.items()}, "step": step})
        del self._pending[:-_MAX_PENDING]
        self.save()

    @rank_zero_only
    def save(self) -> None:
        if not self._pending:
            return
        new = sorted({name for row in self._pending for name in row} - set(self._columns))
        if new:
            rows = self._read() if self.path.exists() else []
            columns = sorted({*self._columns, *new, *(name for row in rows for name in row)})
            self._rewrite([*rows, *self._pending], columns)
        else:
            append_text(self.path, _table(self._pending, self._columns))
        self._pending = []

    @rank_zero_only
    def resume_at(self, step: int, validates: bool) -> None:
        """Delete the rows that a run resumed at `step` writes again, and a row whose end is missing.

        validates: the step before it was trained and is still to be validated.
        """
        if self.path.exists():
            last = step if validates else step - 1
            rows = [
                row
                for row in self._read()
                if _number(row.get("step")) < last
                or (
                    _number(row.get("step")) == last
                    and not (validates and any(value for name, value in row.items() if name.startswith("val")))
                )
            ]
            self._rewrite(rows, sorted({name for row in rows for name in row} or {"step"}))

    def _read(self) -> list[dict[str, Any]]:
        text = self.path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
        whole = text[: text.rfind("\n") + 1]
        return [
            {key: value for key, value in row.items() if key and value} for row in csv.DictReader(io.StringIO(whole))
        ]

    def _rewrite(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
        save_text(self.path, ",".join(columns) + "\n" + _table(rows, columns))
        self._columns = columns


def _table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return float("-inf")


def never_fail(board: Logger) -> Logger:
    """Let a logger's errors be one log line instead of the end of training; return it."""
    cls = type(board)
    failed: list[bool] = []

    def report(error: Exception) -> None:
        if not failed:
            place = getattr(board, "path", None) or getattr(board, "log_dir", None) or getattr(board, "save_dir", None)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            logger.error("%-11s %s cannot log to %s, training continues: %s", "metrics", cls.__name__, place, reason)
            failed.append(True)

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Logger, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                report(error)

        return call

    members: dict[str, Any] = {name: guarded(getattr(cls, name)) for name in _METHODS if hasattr(cls, name)}
    original = getattr(cls, "experiment", None)
    if isinstance(original, property):

        def experiment(self: Logger) -> Any:
            try:
                return original.__get__(self)
            except Exception as error:
                report(error)
                return _DummyExperiment()

        members["experiment"] = property(experiment)
    board.__class__ = type(cls.__name__, (cls,), members)
    return board


def log_without_copies() -> None:
    """Let `self.log` leave a value that is on its device: Lightning copies all settings of the value, 0.5 ms each."""
    try:
        from pytorch_lightning.trainer.connectors.logger_connector.result import _ResultMetric  # private
    except ImportError:
        return
    move = _ResultMetric.to
    if move.__module__ == __name__:
        return

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = self.value
        stays = len(args) == 1 and not kwargs and isinstance(value, Tensor) and value.device == args[0]
        return self if stays else move(self, *args, **kwargs)

    _ResultMetric.to = to  # type: ignore[method-assign]
