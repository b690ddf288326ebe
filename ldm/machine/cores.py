"""OpenMP threads that sleep between parallel loops while other processes want the cores.

GNU's OpenMP, which torch has on Linux, lets a thread look for more work for milliseconds after each loop. On idle cores
nothing is faster; beside another process a loop waits for a thread that has no core, and steps take up to ten times as
long. OpenMP's threads sleep almost at once while it has more of them than there are cores (`do_spin` in libgomp's
wait.h), so this module gives it more for as long as the cores are wanted. Results do not depend on it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 1.0  # between looks at the machine's use
BEGIN, END = 0.3, 0.15  # missing cores above which threads sleep, and below which they wait actively again


def share_cores(environ: Mapping[str, str] = os.environ) -> None:
    """Watch for other processes from now on, on Linux, unless the environment sets how OpenMP's threads wait."""
    chosen = any(name in environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    if not chosen and sys.platform == "linux" and not any(isinstance(each, Watch) for each in threading.enumerate()):
        Watch().start()


class Use(NamedTuple):
    """Processor seconds so far, niced processes aside: of the cores that this process may use, and of this process."""

    cores: float
    own: float

    @classmethod
    def now(cls, stat: Path = Path("/proc/stat")) -> Use:
        # Of the main thread: 0 is the thread that asks.
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(os.getpid())}
        rows = (line.split() for line in stat.read_text().splitlines() if line.startswith("cpu"))
        # user, nice, system, idle, iowait, irq, softirq
        ticks = sum(int(row[column]) for row in rows if row[0] in allowed for column in (1, 3, 6, 7))
        return cls(ticks / os.sysconf("SC_CLK_TCK"), time.process_time())


class Watch(threading.Thread):
    """Thread that compares the machine's use with this process's, and lets OpenMP's threads sleep or wait."""

    def __init__(self) -> None:
        super().__init__(name="watch for other processes", daemon=True)
        self.sleepers: Sleepers | None = None

    def run(self) -> None:
        with contextlib.suppress(OSError):  # a sandbox without /proc/stat
            self._watch()

    def _watch(self) -> None:
        before, then = Use.now(), time.monotonic()
        while True:
            time.sleep(SECONDS)
            use, now = Use.now(), time.monotonic()
            others = max(0.0, (use.cores - before.cores) - (use.own - before.own)) / (now - then)
            before, then = use, now
            torch: Any = sys.modules.get("torch")
            if threads := torch.get_num_threads() if hasattr(torch, "get_num_threads") else 0:
                self.update(others, threads, len(os.sched_getaffinity(os.getpid())))

    def update(self, others: float, threads: int, cores: int) -> None:
        """others: cores that other processes use; threads: those of a parallel loop."""
        missing = others + threads - cores
        if self.sleepers is None and missing > BEGIN and threads > 1:
            self.sleepers = Sleepers(threads, cores)
        elif self.sleepers is not None and missing < END:
            self.sleepers.end()
            self.sleepers = None


class Sleepers:
    """So many OpenMP threads without work that OpenMP counts more threads than cores, until `end`."""

    def __init__(self, threads: int, cores: int) -> None:
        """threads: those of a parallel loop, at least 2; each Python thread has a team of its own."""
        teams = max(0, cores - threads) // (threads - 1) + 1
        self._began, self._ended = threading.Barrier(teams + 1), threading.Event()
        self._teams = [threading.Thread(target=self._hold, daemon=True) for _ in range(teams)]
        for team in self._teams:
            team.start()
        self._began.wait()

    def _hold(self) -> None:
        import torch  # loaded by now: the module is used before it

        try:
            torch.ones(1 << 18).add_(1.0)  # a parallel loop, whose threads stay as long as this one
        finally:
            self._began.wait()
        self._ended.wait()

    def end(self) -> None:
        self._ended.set()
        for team in self._teams:
            team.join()
