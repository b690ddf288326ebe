"""The machine of a run: its name, versions, and the peak that floors refer to."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import synchronize
from ldm.paths import ROOT


def environment(device: torch.device) -> dict[str, Any]:
    """The facts of the machine and of its libraries that results depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cores} cores of {_cpu()}",
        "device": device.type,
        "cpu": _cpu(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def _cpu() -> str:
    """The processor's name, with the instructions that decide how fast it is in 16 bits."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    lines = (line.partition(":") for line in text.splitlines())
    facts = {name.strip(): value.strip() for name, _, value in lines}
    name = facts.get("model name") or platform.processor() or platform.machine()
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 bf16", "avx512_vnni": "VNNI"}
    extras = [label for flag, label in known.items() if flag in facts.get("flags", "").split()]
    return f"{name} ({', '.join(extras)})" if extras else name


def commit() -> str:
    """The checkout's commit; empty outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def peak_flops(dtype: torch.dtype, device: torch.device, side: int) -> float:
    """FLOP per second of a product of square matrices of this side, the best of 5."""
    a = torch.randn(side, side, device=device).to(dtype)
    times = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2.0 * side**3 / min(times[1:])
