"""Memory, disk space and time of a training run, computed from its shapes and settings."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.models.frozen import castable, frozen_stages
from ldm.modules.ema import LitEma
from ldm.training.doctor.examined import Examined
from ldm.training.doctor.footprint import nbytes
from ldm.training.strategies import REPLICAS

EFFICIENCY = 0.4  # of a training step, as a share of the speed of a matrix product
GIB = 2**30


def memory_rows(run: Examined) -> list[tuple[str, int]]:
    """Return the parts of the memory of one device, in bytes."""
    if run.footprint is None:
        return []
    rows: dict[str, int] = {"weights, trained": 0}
    averages = [module for module in run.model.children() if isinstance(module, LitEma)]
    narrow, on_cpu = _held_in_16_bits(run.model), run.devices.accelerator == "cpu"
    inside = {id(tensor) for module in averages for tensor in module.buffers()}
    for name, parameter in run.model.named_parameters():
        part = name.partition(".")[0].removesuffix("_model").replace("_", " ")
        row = "weights, trained" if parameter.requires_grad else f"weights, {part} (frozen)"
        size = nbytes(parameter)
        if id(parameter) in narrow:  # the weights before the cast wait in RAM
            size = 2 * parameter.numel() + (size if on_cpu else 0)
        rows[row] = rows.get(row, 0) + size
    state = run.footprint.optimizer
    rows["gradients"] = run.footprint.gradients
    rows["optimizer"] = 2 * run.footprint.gradients if state is None else state
    here = (module for module in averages if not module.on_cpu or on_cpu)
    rows["EMA"] = sum(nbytes(tensor) for module in here for tensor in module.buffers())
    if run.strategy.startswith("ddp") and run.strategy not in REPLICAS and run.ranks > 1:
        rows["gradients, exchanged by DDP"] = run.footprint.gradients
    if run.strategy.startswith("fsdp"):
        for row in ("weights, trained", "gradients", "optimizer", "EMA"):
            rows[row] //= run.ranks
    rows["buffers"] = sum(nbytes(tensor) for tensor in run.model.buffers() if id(tensor) not in inside)
    rows["activations"] = run.footprint.activations
    return [(name, size) for name, size in rows.items() if size >= 2**20 or name == "activations"]


def _held_in_16_bits(model: Any) -> set[int]:
    """Return the identities of the weights that `frozen_precision` holds in 16 bits."""
    if getattr(model, "frozen_precision", None) is None:
        return set()
    frozen = frozen_stages({"first stage": model.first_stage_model, "condition stage": model.cond_stage_model})
    return {id(weight) for stage in frozen for weight in castable(stage) if weight.itemsize > 2}


def device_memory(run: Examined) -> int | None:
    """Return the memory of the first device in bytes; None if this machine lacks it."""
    if not run.has_devices:
        return None
    if run.devices.accelerator == "cuda":
        return int(torch.cuda.get_device_properties(run.devices.first).total_memory)
    if run.devices.accelerator == "mps":
        return int(torch.mps.recommended_max_memory())
    if not hasattr(os, "sysconf"):
        return None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # of a container
        if Path(file).is_file() and (text := Path(file).read_text().strip()).isdigit():
            memory = min(memory, int(text))
    return memory // run.devices.processes


def checkpoint_size(run: Examined) -> int:
    """Return the bytes of a checkpoint: weights, averages and the optimizer's state; of adapters, these alone."""
    assert run.footprint is not None
    state: Mapping[str, Tensor] = run.model.state_dict(keep_vars=True)
    own = run.model.adapter_keys() if getattr(run.model, "trains_adapters", False) else state.keys()
    return sum(nbytes(state[name]) for name in own) + (run.footprint.optimizer or 2 * run.footprint.gradients)


def expected_step(run: Examined) -> float | None:
    """Return the seconds of an optimizer step, from the step with numbers, or else from its operations."""
    if run.footprint is None or not run.has_devices:
        return None
    samples = run.batch_size * run.accumulated
    if run.step_seconds is not None:
        return run.step_seconds * samples
    return run.footprint.flops * run.accumulated / (EFFICIENCY * product_speed(run))


def product_speed(run: Examined) -> float:
    """Return the floating-point operations per second of a matrix product in the run's precision."""
    dtype = torch.float32 if run.precision.startswith(("32", "64")) else torch.bfloat16
    return _measured_speed(run.devices.first if run.devices.first != "auto" else "cpu", dtype)


@cache
def _measured_speed(device: str, dtype: torch.dtype) -> float:
    side = 1024 if device == "cpu" else 8192
    a = torch.ones(side, side, dtype=dtype, device=device)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def size_text(count: int) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.1f} MiB"
