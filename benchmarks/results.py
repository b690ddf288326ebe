"""Results of runs on one machine and day: a JSON file, written again after each row."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.environment import commit, peak_flops
from benchmarks.measure import Row, Served, Work, measure
from benchmarks.models import Models
from benchmarks.rows import ROWS
from ldm.atomic import save_text


class Results:
    """The rows that were measured so far. Those of an earlier run today in the same environment are kept."""

    def __init__(self, environment: Mapping[str, Any], folder: Path | None) -> None:
        self.environment, self.failed, self.began = dict(environment), False, time.monotonic()
        self.rows: dict[str, Any] = {}
        self.peaks: dict[Any, float] = {}
        self.path: Path | None = None
        name = re.sub(r"[^a-z0-9]+", "-", self.environment["machine"].lower()).strip("-")
        for number in count(1) if folder else ():
            assert folder is not None
            self.path = folder / f"{name}-{time.strftime('%Y-%m-%d')}{f'-{number}' if number > 1 else ''}.json"
            saved = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else None
            if saved is None or saved["environment"] == self.environment:
                self.rows = saved["rows"] if saved else {}
                break

    def row(self, name: str, models: Models, repeat: int, seconds: float, limit: float) -> str:
        """Measure a row, write it, and return its line. limit: seconds of the run after which no row begins."""
        if time.monotonic() - self.began > limit:
            return f"{name:<20} skipped: no time left"
        size = models.size
        try:
            work = ROWS[name](models)
            size = work.size or size
            row = self._measured(name, work, models, repeat, seconds)
            if work.dtype is not None and "ours" in row:
                row["peak_flops"] = self._peak(work.dtype, models)
        except Exception as error:  # out of memory, a missing kernel: the other rows go on
            row = {"what": name, "failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        self.failed |= "ours" not in row
        row |= {"size": size, "commit": commit(), "time": time.strftime("%F %T"), "order": list(ROWS).index(name)}
        self.rows[name] = row
        if self.path is not None:
            content = {"environment": self.environment, "rows": self.rows}
            save_text(self.path, json.dumps(content, indent=1) + "\n")
        return line(name, self.rows[name])

    @staticmethod
    def _measured(name: str, work: Row, models: Models, repeat: int, seconds: float) -> dict[str, Any]:
        if not (isinstance(work, Work) and work.own_processes):
            return measure(work, repeat, seconds)
        models.release()
        where = models.size, models.device, models.folder
        with Served(name, "ours", *where) as ours, Served(name, "theirs", *where) as theirs:
            return measure(replace(work, ours=ours, theirs=theirs), repeat, seconds)

    def _peak(self, dtype: Any, models: Models) -> float:
        if dtype not in self.peaks:
            side = {"full": 8192 if models.device.type == "cuda" else 2048}.get(models.size, 512)
            self.peaks[dtype] = peak_flops(dtype, models.device, side)
        return self.peaks[dtype]


def line(name: str, row: Mapping[str, Any]) -> str:
    """A row as one line of text."""
    if "ours" not in row:
        return f"{name:<20} {'void: ' + row['void'] if 'void' in row else 'failed: ' + row['failed']}"
    ours, theirs, ratio = (row[key] for key in ("ours", "theirs", "ratio"))
    floor = floor_percent(row)
    parts = [
        f"{name:<20} {seconds(ours['median'])} per {row['unit']}, {row['against']} {seconds(theirs['median'])}",
        f"ratio {ratio['median']:.3f} ({ratio['p10']:.3f} to {ratio['p90']:.3f}, {row['pairs']} pairs)",
        f"CPU {row['cpu_ratio']['median']:.2f}",
        "" if floor is None else f"{floor:.0f} % of the peak",
        row.get("parity", {}).get("text", ""),
    ]
    return "; ".join(part for part in parts if part)


def floor_percent(row: Mapping[str, Any]) -> float | None:
    """The time that the operations take at the machine's peak, in percent of ours."""
    return 100 * row["flop"] / row["peak_flops"] / row["ours"]["median"] if row.get("peak_flops") else None


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= scale or unit == "us":
            return f"{value / scale:.3g} {unit}"
    raise AssertionError
