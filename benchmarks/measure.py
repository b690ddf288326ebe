"""Pairs of timings: two sides alternate in one process tree, so that a busy machine slows both alike."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ldm.paths import ROOT

RELATIVE, PSNR = 1e-4, 35.0  # limits of the difference: relative in float32, in dB otherwise


@dataclass(frozen=True)
class Sample:
    """One timed call. cpu_seconds: of all threads. Peaks of memory are None where they are not measured."""

    seconds: float
    cpu_seconds: float
    output: Tensor | None = None
    peak_bytes: int | None = None  # CUDA: own weights and what the call adds; a process: resident
    anonymous_bytes: int | None = None  # a process: without mapped files, which the system can drop


Side = Callable[[], Sample]
Pair = tuple[Sample, Sample]


@dataclass(frozen=True)
class Row:
    """Work that is timed. per: units of a call, e.g. 4 steps; dtype: of the peak that it is compared with, if any."""

    what: str
    unit: str
    per: float
    against: str = field(default="diffusers", kw_only=True)
    dtype: torch.dtype | None = field(default=None, kw_only=True)
    size: str | None = field(default=None, kw_only=True)  # of the model, if it is not that of the run


@dataclass(frozen=True)
class Work(Row):
    """A row of two sides that can be called in any order. exact: compare as float32."""

    ours: Side
    theirs: Side
    exact: bool = False
    compared: bool = True  # False: the outputs cannot be compared, as of imports
    own_processes: bool = False  # see `Served`


@dataclass(frozen=True)
class Alternated(Row):
    """A row whose sides take turns by themselves: (most pairs, most seconds) -> pairs and operations of a call."""

    run: Callable[[int, float], tuple[Sequence[Pair], float]]


def in_process(
    call: Callable[[], Tensor], device: torch.device, modules: Callable[[], Sequence[nn.Module]] = tuple
) -> Side:
    """A side that calls a function here. modules: those it uses, whose weights count in the peak."""

    def side() -> Sample:
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        synchronize(device)
        start, worked = time.perf_counter(), time.process_time()
        output = call()
        synchronize(device)
        seconds, worked = time.perf_counter() - start, time.process_time() - worked
        weights = sum(p.numel() * p.element_size() for module in modules() for p in module.parameters())
        peak = torch.cuda.max_memory_allocated(device) - before + weights if cuda else None
        return Sample(seconds, worked, output, peak)

    return side


def in_child(command: Sequence[str], output: Callable[[], Tensor] | None = None) -> Side:
    """A side that runs a command of this checkout, without network. Its last line may be the JSON of its own timing."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

    def side() -> Sample:
        anonymous = peak = 0
        with TemporaryFile("w+") as printed:
            start = time.perf_counter()
            child = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=printed, stderr=subprocess.STDOUT)
            while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
                anonymous = max(anonymous, _memory(child.pid, "RssAnon"))
                peak = max(peak, _memory(child.pid, "VmHWM"))  # ru_maxrss begins with what this process has
                time.sleep(0.005)
            seconds, (_, status, usage) = time.perf_counter() - start, ended
            child.returncode = os.waitstatus_to_exitcode(status)
            printed.seek(0)
            lines = printed.read().splitlines()
        if child.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {child.returncode}, {lines[-1] if lines else ''}")
        own: dict[str, float] = next((json.loads(line) for line in reversed(lines) if line.startswith("{")), {})
        times = {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, **own}
        tensor = None if output is None else output()
        return Sample(**times, output=tensor, peak_bytes=peak or None, anonymous_bytes=anonymous or None)

    return side


class Served:
    """A side in a process that stays for all calls of a row, as a user's program would: it has the allocator to itself.

    The process begins at the first call; leave the context to end it.
    """

    def __init__(self, row: str, who: str, size: str, device: torch.device, folder: Path) -> None:
        arguments = json.dumps({"size": size, "device": str(device), "folder": str(folder)})
        self.command = [sys.executable, "-m", "benchmarks.side", row, who, arguments]
        self._scope = contextlib.ExitStack()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Served:
        self._folder = Path(self._scope.enter_context(TemporaryDirectory(prefix="benchmarks-")))
        self._errors = self._scope.enter_context(TemporaryFile("w+"))
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._scope.close()

    def __call__(self) -> Sample:
        file = self._folder / "output.pt"
        times, pid = self._ask(str(file))
        output = torch.load(file, weights_only=True)
        return Sample(times["seconds"], times["cpu_seconds"], output, _memory(pid, "VmHWM"))

    def operations(self) -> float:
        """Floating-point operations of a call."""
        return self._ask("count")[0]["flop"]

    def _ask(self, line: str) -> tuple[dict[str, float], int]:
        if self._process is None:
            environ, pipe = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}, subprocess.PIPE
            options: Any = {"stdin": pipe, "stdout": pipe, "stderr": self._errors, "text": True}
            self._process = subprocess.Popen(self.command, cwd=ROOT, env=environ, **options)
        process = self._process
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):  # it ended: the reason is read below
            process.stdin.write(line + "\n")
            process.stdin.flush()
        for answer in process.stdout:
            if answer.startswith("{"):
                return json.loads(answer), process.pid
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-1:]
        raise RuntimeError(f"{' '.join(self.command[2:5])}: exit code {process.wait()}, {''.join(last)}")


def _memory(pid: int, name: str) -> int:
    """Bytes of an entry of a process's status; 0 where it cannot be read."""
    with contextlib.suppress(OSError, StopIteration):  # not Linux, or ended
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
    return 0


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(work: Row, repeat: int, seconds: float) -> dict[str, Any]:
    """Time pairs until `repeat` or `seconds` are reached, after a first one that only warms up -> the row's result.

    The side that begins alternates. A row with a pair whose outputs differ is void and has no timings.
    """
    row: dict[str, Any] = {"what": work.what, "unit": work.unit, "against": work.against}
    if isinstance(work, Alternated):
        taken, flop = work.run(repeat, seconds)
        return {**row, **statistics(taken, work.per), "flop": flop / work.per}
    assert isinstance(work, Work)
    end, flop = time.perf_counter() + seconds, 0.0
    if work.dtype is not None:
        flop = operations(work.theirs) / work.per
    pairs = [(work.ours(), work.theirs())]
    while len(pairs) <= 1 or (len(pairs) <= repeat and time.perf_counter() < end):
        if work.compared:
            row["parity"] = parity(pairs[-1][0].output, pairs[-1][1].output, work.exact)
            if not row["parity"]["passed"]:
                return {**row, "void": f"the outputs differ: {row['parity']['text']}"}
        pairs = [(_without_output(ours), _without_output(theirs)) for ours, theirs in pairs]
        first, second = (work.ours, work.theirs) if len(pairs) % 2 else (work.theirs, work.ours)
        one, other = first(), second()
        pairs.append((one, other) if first is work.ours else (other, one))
    return {**row, **statistics(pairs[1:], work.per), "flop": flop}


def _without_output(sample: Sample) -> Sample:
    return replace(sample, output=None)


def statistics(pairs: Sequence[Pair], per: float = 1.0) -> dict[str, Any]:
    """Medians and spreads: of each side's seconds a unit, and of the ratios within pairs."""
    result: dict[str, Any] = {"pairs": len(pairs)}
    for name, side in zip(("ours", "theirs"), zip(*pairs)):
        result[name] = spread([sample.seconds / per for sample in side])
        result[name]["cpu"] = float(np.median([sample.cpu_seconds / per for sample in side]))
        for peak in ("peak_bytes", "anonymous_bytes"):
            values = [getattr(sample, peak) for sample in side]
            result[name][peak] = None if None in values else max(values)
    result["ratio"] = spread([ours.seconds / theirs.seconds for ours, theirs in pairs])
    result["cpu_ratio"] = spread([ours.cpu_seconds / max(theirs.cpu_seconds, 1e-9) for ours, theirs in pairs])
    return result


def spread(values: Sequence[float]) -> dict[str, float]:
    return {name: float(np.percentile(values, q)) for name, q in (("median", 50), ("p10", 10), ("p90", 90))}


def parity(ours: Tensor | None, theirs: Tensor | None, exact: bool) -> dict[str, Any]:
    """Compare outputs: relative error (Frobenius norm) if `exact`, else PSNR over the range of `theirs`."""
    if ours is None or theirs is None or ours.shape != theirs.shape:
        shapes = [None if x is None else tuple(x.shape) for x in (ours, theirs)]
        return {"passed": False, "text": f"shapes {shapes[0]} and {shapes[1]}"}
    if torch.equal(ours, theirs):
        return {"passed": bool(theirs.isfinite().all()), "text": "equal"}
    ours, theirs = ours.double(), theirs.double()
    if exact:
        error = float((ours - theirs).norm() / theirs.norm())
        return {"passed": error < RELATIVE, "text": f"{error:.1e} relative"}  # NaN does not pass
    decibel = float(10 * torch.log10((theirs.max() - theirs.min()) ** 2 / (ours - theirs).square().mean()))
    return {"passed": decibel > PSNR, "text": f"{decibel:.1f} dB"}


def operations(side: Side) -> float:
    """Floating-point operations of a call of a side, uncompiled."""
    if isinstance(side, Served):
        return side.operations()
    with flop_counter() as counter, torch.compiler.set_stance("force_eager"):
        side()
    return counter.get_total_flops()


@contextlib.contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """Count floating-point operations of matrix products, convolutions and attention: 2 a multiply-add."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def count(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    custom: Mapping[Any, Any] = {attention: count}
    with FlopCounterMode(display=False, custom_mapping=dict(custom)) as counter:
        yield counter
