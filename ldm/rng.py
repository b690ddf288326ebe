"""Save and restore the states of the global random generators of Python, NumPy and torch."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")


def torch_states(device: torch.device = CPU) -> list[Tensor]:
    """Return the states of torch's generators on the CPU and, if it differs, on `device`."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def set_torch_states(states: Sequence[Tensor], device: torch.device = CPU) -> None:
    """Restore the states returned by `torch_states(device)`."""
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)


@contextmanager
def preserve_torch_rng(device: torch.device = CPU) -> Iterator[None]:
    """Restore torch's generators on the CPU and on `device` at the end of the block."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        yield


@contextmanager
def preserve_rng(device: torch.device = CPU) -> Iterator[None]:
    """Restore the generators of torch, Python and NumPy at the end of the block."""
    python, numpy = random.getstate(), np.random.get_state()
    with preserve_torch_rng(device):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
