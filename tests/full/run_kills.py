"""Runs that are killed, and newest checkpoints that are damaged: a resumed run ends as an uninterrupted one."""

from __future__ import annotations

import csv
import functools
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import ldm.callbacks.checkpoints as checkpoints
import ldm.callbacks.run_directory as run_directory
import ldm.training.launch as launch
import ldm.training.loggers as loggers
from ldm.checkpoint import write
from ldm.checkpoint.formats import global_step
from ldm.checkpoint.resume import find_checkpoint
from tests.full.stops import difference, result, run_of, train

STEPS = "lightning.modelcheckpoint.params.every_n_train_steps=1"
WAYS = {
    "monitor": ["--max_epochs", "5", STEPS, "--logger", "true", "--log_every_n_steps", "1"],
    "no-monitor": ["--max_epochs", "3", "model.params.monitor=null", "--logger", "true", "--log_every_n_steps", "1"],
}
# Functions before whose call number n the process is killed.
FAULTS: dict[str, tuple[Any, str]] = {
    "checkpoint": (write, "_torch_save"),
    "verification": (write, "verify_file"),
    "rename": (os, "replace"),
    "copy": (checkpoints, "copy_file"),
    "removal": (checkpoints.CheckpointPolicy, "_remove_checkpoint"),
    "configs": (run_directory, "save_text"),
    "launch": (launch, "save_text"),
    "metrics": (loggers, "save_text"),
}


LOG = Path(tempfile.gettempdir()) / f"run_kills-{os.getpid()}.log"  # output of the last process


def last_lines(log: Path = LOG) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-5:])


def fork(call: Callable[[], int], log: Path = LOG) -> int:
    """Call in a forked process whose output goes to `log` -> its id."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            torch.set_num_threads(1)
            code = call()
        finally:
            os._exit(code)
    return child


def in_child(call: Callable[[], int], kill_after: float | None = None) -> int:
    """Call in a forked process, killed after some seconds -> its exit code, or -9."""
    child = fork(call)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def started(folder: Path) -> bool:
    """True if a run left configs to resume from; removes what an earlier kill left."""
    runs = list((folder / "logs").glob("*_run*"))
    if any(list(run.glob("configs/*-lightning.yaml")) for run in runs):
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def check_end(folder: Path, whole: dict[str, Any]) -> None:
    """AssertionError unless the finished run equals the uninterrupted one and left no temporary file."""
    assert not (found := difference(whole["files"], result(folder)["files"])), found
    assert not list(folder.rglob("*.tmp")), list(folder.rglob("*.tmp"))
    with open(run_of(folder) / "csv" / "metrics.csv", newline="") as file:
        names = ("train/loss_step", "train/loss", "train/loss_simple_step")
        steps = [row["step"] for row in csv.DictReader(file) if any(row.get(name) for name in names)]
    twice = [step for step, count in Counter(steps).items() if count > 1]
    assert steps and not twice, f"steps twice in metrics.csv: {twice}"
    assert [int(step) for step in steps] == sorted(map(int, steps))


@functools.cache
def uninterrupted(folder: Path, way: str) -> tuple[Path, dict[str, Any], float]:
    """-> (the folder of a run that was never killed, its result, its seconds); run once."""
    begin, whole = time.monotonic(), folder / f"whole-{way}"
    assert in_child(lambda: train(whole, WAYS[way])) == 0
    return whole, result(whole), time.monotonic() - begin


def check_kills(folder: Path, way: str, kills: int = 50, seed: int = 0) -> Iterator[int]:
    """Kill -9 at random moments of runs that are resumed until they end -> the number of kills so far."""
    draw, done, number = random.Random(seed), 0, 0
    _, whole, seconds = uninterrupted(folder, way)
    while done < kills:
        part, number, resume = folder / f"part-{number}", number + 1, False
        for _ in range(6):
            code = in_child(lambda: train(part, WAYS[way], resume=resume), draw.uniform(0, 1.1 * seconds))  # noqa: B023
            if code == 0:
                break
            assert code == -signal.SIGKILL, f"exit code {code}: {last_lines()}"
            done += 1
            yield done
            resume = started(part)
        if code != 0:
            code = in_child(lambda: train(part, WAYS[way], resume=resume))  # noqa: B023
        assert code == 0, f"not resumed: exit code {code}: {last_lines()}"
        check_end(part, whole)


def check_faults(
    folder: Path, way: str, faults: Iterable[str] = FAULTS, calls: Iterable[int] = range(8)
) -> Iterator[tuple[str, int]]:
    """Kill before call number n of each function, in the run and in its resume, then let it end.

    Yields each point and its kills: 0 if the run has no such call.
    """
    _, whole, _ = uninterrupted(folder, way)

    def killed(part: Path, fault: str, call: int, resume: bool) -> int:
        owner, name = FAULTS[fault]
        original, count = getattr(owner, name), iter(range(1000))

        def replacement(*args: Any, **kwargs: Any) -> Any:
            if next(count) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, replacement)  # of the child process alone
        return train(part, WAYS[way], resume=resume)

    for fault in faults:
        for call in calls:
            part, resume, kills = folder / f"{fault}-{call}", False, 0
            for _ in range(2):
                code = in_child(lambda: killed(part, fault, call, resume))  # noqa: B023
                assert code in (0, -signal.SIGKILL), f"{fault} {call}: exit code {code}"
                if code == 0:
                    break
                resume, kills = started(part), kills + 1
            if code != 0:
                code = in_child(lambda: train(part, WAYS[way], resume=resume))  # noqa: B023
            assert code == 0, f"{fault} {call}: not resumed: exit code {code}: {last_lines()}"
            check_end(part, whole)
            yield f"{fault} {call}", kills


def damages(size: int, seed: int = 0) -> dict[str, Callable[[Path], None]]:
    """Ways to damage a file of `size` bytes in place: 20 truncations, 20 flipped bits, empty, missing."""
    draw = random.Random(seed)

    def flip(path: Path, offset: int, bit: int) -> None:
        with open(path, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ (1 << bit)]))

    found: dict[str, Callable[[Path], None]] = {"empty": lambda path: os.truncate(path, 0), "missing": Path.unlink}
    for offset in draw.sample(range(1, size), 20):
        found[f"truncated at {offset}"] = lambda path, offset=offset: os.truncate(path, offset)
    for offset in draw.sample(range(size), 20):
        found[f"bit of {offset}"] = lambda path, offset=offset: flip(path, offset, offset % 8)
    return found


def check_damage(folder: Path, way: str, keep: Callable[[str], bool] = lambda name: True) -> Iterator[str]:
    """Damage last.ckpt in each way: the run resumes at the same step."""
    run = run_of(uninterrupted(folder, way)[0])
    last = run / "checkpoints" / "last.ckpt"
    content, step = last.read_bytes(), global_step(last)
    for name, damage in damages(len(content)).items():
        if keep(name):
            damage(last)
            found = find_checkpoint(run, full_state=True)
            same = last.exists() and last.read_bytes() == content
            assert global_step(found) == step, f"{name}: {found} is of step {global_step(found)}, not {step}"
            assert same or found != last or name.startswith("bit"), f"{name}: not detected"
            last.write_bytes(content)
            yield name


def run(parts: Iterable[str] = ("kills", "faults", "damage")) -> Iterator[str]:
    """Yield one line per part and kind of run."""
    for part in parts:
        for way in WAYS:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                if part == "kills":
                    done = sum(1 for _ in check_kills(folder, way))
                    yield f"{way}: killed at {done} random moments; all runs ended as an uninterrupted one"
                elif part == "faults":
                    kills = [kills for _, kills in check_faults(folder, way)]
                    done = f"{sum(kills)} kills at {sum(map(bool, kills))} of {len(kills)} fault points"
                    yield f"{way}: {done} (the others do not occur); all runs ended as an uninterrupted one"
                else:
                    done = sum(1 for _ in check_damage(folder, way))
                    yield f"{way}: last.ckpt damaged in {done} ways; each resumes at the same step"
