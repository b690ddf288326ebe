"""The global random generators, and putting them back where they were."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")


def torch_states(device: torch.device = CPU) -> list[Tensor]:
    """States of torch's generators on the CPU and, where it is another, on `device` (cuda, mps, ...)."""
    return [
        torch.get_rng_state(),
        *([torch.get_device_module(device).get_rng_state(device)] if device.type != "cpu" else []),
    ]


def set_torch_states(states: Sequence[Tensor], device: torch.device = CPU) -> None:
    """Put torch's generators where `torch_states(device)` found them."""
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)


@contextmanager
def torch_generators_kept(device: torch.device = CPU) -> Iterator[None]:
    """Whatever is drawn or seeded within, afterwards torch's generators on the CPU and on `device` are where they were."""
    states = torch_states(device)
    try:
        yield
    finally:
        set_torch_states(states, device)


@contextmanager
def generators_kept(device: torch.device = CPU) -> Iterator[None]:
    """`torch_generators_kept`, and Python's and NumPy's generators too."""
    states = random.getstate(), np.random.get_state()
    with torch_generators_kept(device):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
