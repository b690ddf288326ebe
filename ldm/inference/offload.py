"""Offloading: stages of a model wait on the CPU while they are not in use, which saves memory of the GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ldm.inference.settings import OFFLOADS

_IN_USE = "_offload_in_use"  # attribute of a stage: its context
_CALLS = ("forward", "encode", "decode", "encode_tokens")  # how models and tasks use a stage


def offloaded_stages(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the stages that `--offload` NAME keeps on the CPU; raise ValueError if the model has none of them."""
    found = dict.fromkeys(getattr(model, stage, None) for stage in OFFLOADS[name])  # two may be one and the same
    stages = [stage for stage in found if isinstance(stage, nn.Module) and list(stage.parameters())]
    if not stages:
        raise ValueError(f"--offload {name}: this model has no {' or '.join(OFFLOADS[name])} with weights; remove it")
    return stages


def move_rest(model: nn.Module, stages: Sequence[nn.Module], device: torch.device) -> None:
    """Move a model to `device`, except for `stages`, which stay where they are."""
    kept = {name: stage for name in OFFLOADS["all"] if (stage := getattr(model, name, None)) in stages}
    for name in kept:
        setattr(model, name, None)
    try:
        model.to(device)
    finally:
        for name, stage in kept.items():
            setattr(model, name, stage)


def keep_on_cpu(stages: Sequence[nn.Module], networks: Iterable[nn.Module], device: torch.device) -> None:
    """Keep `stages` on the CPU; each is on `device` during its calls, and the `networks` are on the CPU meanwhile.

    Networks that are added to `networks` later move too.
    """
    for stage in stages:
        _keep_one(stage, networks, device)


def in_use(stage: Any) -> AbstractContextManager[None]:
    """Context in which a stage that waits on the CPU stays on its device from call to call; of others, nothing."""
    return getattr(stage, _IN_USE, nullcontext)()


def _keep_one(stage: nn.Module, networks: Iterable[nn.Module], device: torch.device) -> None:
    cpu, depth = torch.device("cpu"), 0  # of calls within calls

    @contextmanager
    def in_use() -> Iterator[None]:
        nonlocal depth
        if depth == 0:
            for network in networks:
                network.to(cpu)
            stage.to(device)
        depth += 1
        try:
            yield
        finally:
            depth -= 1
            if depth == 0:
                stage.to(cpu)
                for network in networks:
                    network.to(device)

    for name in _CALLS:
        if (call := getattr(stage, name, None)) is not None:
            setattr(stage, name, in_use()(call))
    setattr(stage, _IN_USE, in_use)
