"""Jobs of the page: one at a time in the order of their arrival, each with its progress, and its own cancel."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from ldm.atomic import is_out_of_memory
from ldm.cli import one_line

logger = logging.getLogger(__name__)

WAITING, LOADING, RUNNING, DONE, CANCELLED, FAILED = "waiting", "loading", "running", "done", "cancelled", "failed"
ENDED = (DONE, CANCELLED, FAILED)


class Cancelled(Exception):
    """Raised in a job by its next report after `cancel`."""


class Job:
    """A request of one user and its progress. The thread of the queue writes it, handlers of the page read it."""

    def __init__(self, work: Callable[[Job], None], steps: int = 0, images: int = 0) -> None:
        self.work: Callable[[Job], None] | None = work  # None at the end: it holds the uploads
        self.steps, self.images = steps, images  # steps: of the sampler, over all batches
        self.state, self.step = WAITING, 0
        self.files: list[Path] = []
        self.notes: list[str] = []  # warnings, as the scripts log them
        self.preview: Image.Image | None = None
        self.error = ""
        self.seconds = 0.0  # of work, without waiting
        self.version = 0  # counts the reports
        self._cancelled = False

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def report(self, state: str | None = None) -> None:
        """Count a change, for whoever follows the job; raise Cancelled if the job was cancelled."""
        self.state = state or self.state
        self.version += 1
        if self.ended:
            self.work = self.preview = None
        elif self._cancelled:
            raise Cancelled

    def cancel(self) -> None:
        self._cancelled = True

    def run(self) -> None:
        """Do the work, in the thread of the queue; an error that the user can fix is one line, as of a script."""
        start = time.perf_counter()
        assert self.work is not None
        try:
            with collected_warnings(self.notes):
                self.report(LOADING)
                self.work(self)
            end = DONE
        except Cancelled:
            end = CANCELLED
        except Exception as error:
            end, self.error = FAILED, one_line(error)
            if is_out_of_memory(error):
                self.error += "; choose fewer or smaller images"
            elif not isinstance(error, (ValueError, OSError, ImportError)):
                logger.exception("a job failed")
                self.error = f"{type(error).__name__}: {self.error} (the log of the server has more)"
        self.seconds = time.perf_counter() - start
        self.report(end)


class Queue:
    """A thread that runs jobs one after another: there is one model in memory."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._running: Job | None = None
        threading.Thread(target=self._work, name="jobs", daemon=True).start()

    def add(self, job: Job) -> None:
        with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()

    def ahead(self, job: Job) -> int:
        """The number of jobs that come before this one."""
        with self._changed:
            waiting = list(self._waiting)
            return waiting.index(job) + (self._running is not None) if job in waiting else 0

    def cancel(self, job: Job) -> None:
        """Stop a job at its next step; one that waits is taken out."""
        job.cancel()
        with self._changed:
            waits = job in self._waiting
            if waits:
                self._waiting.remove(job)
        if waits:
            job.report(CANCELLED)

    def close(self, patience: float = 2.0) -> None:
        """Cancel all jobs, and wait `patience` seconds for the end of the running one."""
        with self._changed:
            jobs = [*self._waiting, *filter(None, [self._running])]
        for job in jobs:
            self.cancel(job)
        with self._changed:
            self._changed.wait_for(lambda: self._running is None, patience)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                self._running = job = self._waiting.popleft()
            job.run()
            with self._changed:
                self._running = None
                self._changed.notify_all()


@contextmanager
def collected_warnings(notes: list[str]) -> Iterator[None]:
    """Add the warnings that this thread logs within the block to `notes`."""
    thread = threading.get_ident()

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread:
                notes.append(record.getMessage())

    handler, root = Collect(logging.WARNING), logging.getLogger("ldm")
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
