"""Training that is killed again and again for a long time: memory, descriptors, temporary files, and the end state.

One run is killed with SIGKILL, with its data worker left behind, and resumed until it ends; another one of the same
configs is never stopped. Both train, validate, log images and save.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

import main
from ldm.checkpoint.formats import global_step
from tests.full.run_kills import check_end, fork, last_lines
from tests.full.stops import result, run_of
from tests.tiny import text_model_config

IMAGES = 64
BATCH = 4
ORPHANS_END = 10.0  # seconds in which the data worker of a killed process has to end
WARM_UP = 0.2  # of a process's samples, before its memory is compared


class Sample(NamedTuple):
    """Resident memory in MiB of a training process and of its tree, and open descriptors of the process."""

    memory: float
    tree: float
    descriptors: int


class Part:
    """A training process, from its start to its end or kill, with samples of it."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.folder, self.temporary = folder, folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self.begin, self.samples, self.tree = time.monotonic(), list[Sample](), set[int]()
        self.newest = (0, -1)  # time of the newest checkpoint, its step
        self.pid = fork(lambda: _main(folder, self.temporary, words), folder / "log.txt")
        self.code: int | None = None

    def sample(self) -> None:
        found = _tree(self.pid)
        self.tree |= set(found)
        if memory := _resident(self.pid):  # not of a process that is about to end
            self.samples.append(Sample(memory, sum(map(_resident, found)), _descriptors(self.pid)))
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        self.code = os.waitstatus_to_exitcode(status) if pid else None

    def kill(self) -> None:
        """Kill the process, not its workers, and wait until they have ended."""
        if self.code is not None:
            return
        os.kill(self.pid, signal.SIGKILL)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        deadline = time.monotonic() + ORPHANS_END
        while alive := [pid for pid in self.tree if pid != self.pid and Path(f"/proc/{pid}/cmdline").exists()]:
            assert time.monotonic() < deadline, f"processes {alive} outlive their killed run"
            time.sleep(0.05)

    @property
    def newest_step(self) -> int:
        """The step of the run's newest checkpoint; -1 if there is none."""
        for last in self.folder.glob("logs/*_run/checkpoints/last.ckpt"):
            if self.newest[0] != (saved_at := last.stat().st_mtime_ns):  # reading takes a tenth of a second
                self.newest = saved_at, global_step(last)
        return self.newest[1]

    def leftovers(self) -> int:
        """Temporary files in the run directory, the system's temporary folder and shared memory."""
        shared = Path("/dev/shm")
        ours = [path for path in shared.glob("*_*") if any(f"_{pid}_" in path.name for pid in self.tree)]
        files = [path for path in self.temporary.rglob("*") if path.is_file()]
        return len([*self.folder.rglob("*.tmp"), *files, *ours])

    def growth(self) -> tuple[float, int]:
        """Growth of memory, as a share, and of descriptors, from after the warm-up to the last tenth of the samples."""
        steady = self.samples[int(WARM_UP * len(self.samples)) :]
        few = max(1, len(steady) // 10)
        first, last = ([statistics.median(column) for column in zip(*some)] for some in (steady[:few], steady[-few:]))
        return last[0] / first[0] - 1, round(last[2] - first[2])

    def row(self) -> str:
        growth, descriptors = self.growth()
        last = self.samples[-1]
        return (
            f"{time.monotonic() - self.begin:5.0f} s, step {self.newest_step:6d}, memory {last.memory:4.0f} MiB "
            f"({growth:+.1%}), with workers {max(each.tree for each in self.samples):4.0f} MiB at most, "
            f"{last.descriptors:2d} descriptors ({descriptors:+d}), {self.leftovers()} temporary files"
        )


def _main(folder: Path, temporary: Path, words: list[str]) -> int:
    os.chdir(folder)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    return main.main(words)


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in _tree(int(child)))]


def _resident(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, IndexError):
        return 0.0


def _descriptors(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def make_inputs(folder: Path, steps: int, every: int, workers: int) -> list[str]:
    """Write images and a config -> the words that train for `steps`; saves, images, validations come `every` few."""
    rng = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir(parents=True)
    for n in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(images / f"{n:02d}.png")
        (images / f"{n:02d}.txt").write_text(f"noise number {n}")
    config: Any = text_model_config(monitor="val/loss_simple_ema", cond_dropout=0.1, untrained_first_stage=True)
    config["model"]["base_learning_rate"] = 1e-4
    sets = {
        split: {
            "target": "ldm.data.folder.ImageFolder",
            "params": {"root": str(images), "captions": "sidecar", "size": 32, "flip_p": 0.5, "split": split},
        }
        for split in ("train", "validation")
    }
    config["data"] = {
        "target": "main.DataModuleFromConfig",
        "params": {"batch_size": BATCH, "num_workers": workers, **sets},
    }
    config["lightning"] = {
        "modelcheckpoint": {"params": {"every_n_train_steps": every}},
        "callbacks": {
            "image_logger": {
                "target": "main.ImageLogger",
                "params": {
                    "batch_frequency": every,
                    "max_images": 2,
                    "increase_log_steps": False,
                    "log_images_kwargs": {"N": 2, "ddim_steps": 2, "plot_denoise_rows": False},
                },
            }
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
    }
    OmegaConf.save(OmegaConf.create(config), folder / "run.yaml")
    epochs = max(1, every // (IMAGES // BATCH))
    limits = ["--max_steps", str(steps), "--check_val_every_n_epoch", str(epochs)]
    return ["-b", str(folder / "run.yaml"), "-t", "-n", "run", *limits]


def images_of(folder: Path) -> dict[str, bytes]:
    run = run_of(folder)
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted((run / "images").rglob("*.png"))}


def check(
    folder: Path, steps: int, every: int, kill_after: float, pause: float, kills: float = float("inf"), workers: int = 0
) -> Iterator[tuple[str, Part]]:
    """Run both runs to `steps`, at the same time; yield the name and the process of each part as it ends.

    kill_after: seconds between a process's first checkpoint and its kill. AssertionError unless both end alike.
    """
    words = make_inputs(folder, steps, every, workers)
    (folder / "whole").mkdir()
    (folder / "killed").mkdir()
    whole, killed = Part(folder / "whole", words), Part(folder / "killed", words)
    number, before, saved_at = 1, -1, float("inf")
    try:
        while whole.code is None or killed.code is None:
            time.sleep(pause)
            for part in (whole, killed):
                if part.code is None:
                    part.sample()
                    if part.code is not None:
                        assert part.code == 0, f"exit code {part.code}: {last_lines(part.folder / 'log.txt')}"
                        yield ("uninterrupted" if part is whole else f"killed, part {number}"), part
            if killed.code is None and number <= kills and killed.newest_step > before:
                saved_at = min(saved_at, time.monotonic())
                if time.monotonic() >= saved_at + kill_after:
                    killed.kill()
                    yield f"killed, part {number}", killed
                    number, before, saved_at = number + 1, killed.newest_step, float("inf")
                    killed = Part(folder / "killed", ["-r", str(run_of(killed.folder)), "-t"])
    finally:
        whole.kill()
        killed.kill()
    check_end(folder / "killed", result(folder / "whole"))
    expected, found = images_of(folder / "whole"), images_of(folder / "killed")
    assert expected.keys() == found.keys(), sorted(expected.keys() ^ found.keys())
    assert not (other := [name for name in expected if expected[name] != found[name]]), f"other images: {other[:3]}"
    assert not whole.leftovers() and not killed.leftovers(), (whole.leftovers(), killed.leftovers())


def run(minutes: float = 45.0, kill_minutes: float = 2.0) -> Iterator[str]:
    """Yield one line per process, then the comparison of the end states."""
    every, trial = 96, 192
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.monotonic()
        for _ in check(folder / "trial", trial, every, kill_after=0.0, pause=1.0, kills=0, workers=1):
            pass
        seconds = time.monotonic() - begin
        steps = max(2, int(60 * minutes / seconds * trial / every)) * every
        yield f"{trial} steps in {seconds:.0f} s; {steps} steps with a kill every {kill_minutes:g} minutes"
        ended = {}
        for label, part in check(folder / "long", steps, every, 60 * kill_minutes, pause=1.0, workers=1):
            ended[label] = part
            yield f"{label}: {part.row()}"
        growth, descriptors = ended["uninterrupted"].growth()
        assert growth < 0.02 and descriptors <= 0, f"growth: memory {growth:.1%}, descriptors {descriptors}"
        images = len(images_of(folder / "long" / "whole"))
        same = f"checkpoints, metrics.csv and {images} logged images"
        yield f"{len(ended) - 2} kills, step {steps}: {same} are those of the uninterrupted run"
