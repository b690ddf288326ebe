"""Random numbers: global generators saved and restored, and numbers that belong to the samples of a batch."""

from __future__ import annotations

import hashlib
import math
import random
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum

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


def seed_generators(seed: int, all_devices: bool = True) -> None:
    """Seed the generators of Python, NumPy and torch with 63 bits; without `all_devices` torch's on the CPU alone."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed) if all_devices else torch.default_generator.manual_seed(seed)


def mix(*numbers: int) -> int:
    """Hash integers to 63 bits that look independent for every other input (BLAKE2b)."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


class Purpose(IntEnum):
    """Uses of random numbers in a training step; those of one use never depend on those of another."""

    TIMESTEP = 21
    NOISE = 22
    CONDITION_DROPOUT = 23
    CONDITION_NOISE = 24
    POSTERIOR = 25
    LOW_SCALE_LEVEL = 26
    LOW_SCALE_NOISE = 27
    IMAGE_SIDE = 28
    OFFSET_NOISE = 29
    MULTIRES_NOISE = 30
    INPUT_PERTURBATION = 31


@dataclass
class BatchSamples:
    """The samples of a batch on this rank: their random numbers and their weight in the loss.

    A sample's numbers follow from (seed, purpose, epoch, index), so they are the same for every batch size, number of
    ranks and device. The n-th call with one purpose returns other numbers than the first.

    indices: of the samples in the dataset, one for each row of the batch.
    total: number of samples of all ranks' batches.
    start: samples of the epoch before this batch. places: of the rows in the batch of all ranks, from 0.
    weight: samples of this rank's batch, relative to the mean over the ranks; 0 if they only fill the last round.
    gradient_scale: factor of this rank's gradients with which an optimizer step averages over all its samples, as
        ranks and accumulated batches may be of different sizes.
    """

    seed: int
    epoch: int
    indices: Sequence[int]
    total: int = 0
    weight: float = 1.0
    gradient_scale: float = 1.0
    start: int = 0
    places: Sequence[int] = ()
    calls: dict[int, int] = field(default_factory=dict)

    def normal(self, shape: Sequence[int], purpose: Purpose, device: torch.device) -> Tensor:
        """Standard normal float32 numbers of `shape` (B, ...), by the Box-Muller transform."""
        columns = math.prod(shape[1:])
        bits = self._bits(shape[0], (columns + 1) // 2, purpose, device)
        radius = (bits >> 32).bitwise_and_(_LOW_32).float().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = bits.bitwise_and_(_LOW_32).float().mul_(2.0 * math.pi * 2.0**-32)
        return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :columns].reshape(tuple(shape))

    def integers(self, high: int, rows: int, purpose: Purpose, device: torch.device) -> Tensor:
        """Integers in [0, high), (rows,) int64; high: at most 2^31."""
        bits = self._bits(rows, 1, purpose, device)[:, 0]
        return ((bits >> 32).bitwise_and_(_LOW_32 >> 1) * high) >> 31

    def uniform(self, rows: int, purpose: Purpose, device: torch.device) -> Tensor:
        """Numbers in [0, 1), (rows,) float32."""
        return self.integers(1 << 24, rows, purpose, device).float() * 2.0**-24

    def stratified(self, rows: int, purpose: Purpose, device: torch.device) -> Tensor:
        """Numbers in [0, 1), (rows,) float32: (u + place / total) mod 1, one u for the batch of all ranks."""
        key = mix(self.seed, purpose, self.epoch, self._next_call(purpose), self.start)
        places = list(self.places or range(len(self.indices)))
        places = [places[row % len(places)] for row in range(rows)]
        values = (key * 2.0**-63 + torch.tensor(places, dtype=torch.float64) / (self.total or len(places))) % 1.0
        return values.float().to(device, non_blocking=device.type == "cuda")

    def _next_call(self, purpose: Purpose) -> int:
        call = self.calls.get(purpose, 0)
        self.calls[purpose] = call + 1
        return call

    def _bits(self, rows: int, columns: int, purpose: Purpose, device: torch.device) -> Tensor:
        """Random 64 bits, (rows, columns) int64; rows beyond the batch continue with its first samples."""
        call = self._next_call(purpose)
        index = torch.tensor(self.indices[:rows], dtype=torch.int64)
        index = index.to(device, non_blocking=device.type == "cuda") * _GOLDEN  # the CPU does not wait for a GPU's step
        turns = range(-(-rows // len(self.indices)))
        keys = torch.cat([index + mix(self.seed, purpose, self.epoch, call, turn) for turn in turns])[:rows]
        counter = torch.arange(1, columns + 1, dtype=torch.int64, device=device) * _GOLDEN
        return _scramble(_scramble(keys)[:, None] + counter)


_LOW_32 = 0xFFFFFFFF
# SplitMix64 (Steele, Lea & Flood 2014, figures 14 and 16), with the constants as signed integers. Its numbers are a
# function of (key, counter), so those of a whole batch are computed at once, on any device.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIERS = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def _scramble(z: Tensor) -> Tensor:
    """Replace int64 numbers by their bijective hash."""
    for shift, factor in zip((30, 27), _MULTIPLIERS):
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))


_samples: BatchSamples | None = None


def current_samples() -> BatchSamples | None:
    """Return the samples whose random numbers models use now; None: those of torch's global generators."""
    return _samples


def set_samples(samples: BatchSamples | None) -> None:
    """Let models use the random numbers of these samples, or with None those of torch's global generators."""
    global _samples
    _samples = samples


@contextmanager
def samples_set(samples: BatchSamples | None) -> Iterator[None]:
    """`set_samples` within the block."""
    previous = current_samples()
    set_samples(samples)
    try:
        yield
    finally:
        set_samples(previous)


def normal_like(x: Tensor, purpose: Purpose) -> Tensor:
    """Standard normal noise of the shape, dtype and device of x (B, ...), of the current samples if there are any."""
    samples = current_samples()
    return torch.randn_like(x) if samples is None else samples.normal(x.shape, purpose, x.device).to(x.dtype)


def integers(high: int, rows: int, purpose: Purpose, device: torch.device) -> Tensor:
    """Uniform integers in [0, high), (rows,) int64, of the current samples if there are any."""
    samples = current_samples()
    if samples is None:
        return torch.randint(0, high, (rows,), device=device)
    return samples.integers(high, rows, purpose, device)


def uniform(rows: int, purpose: Purpose, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), (rows,) float32, of the current samples if there are any."""
    samples = current_samples()
    if samples is None:
        return torch.rand(rows, dtype=torch.float32, device=device)  # the default is 16-bit where all weights are
    return samples.uniform(rows, purpose, device)


def stratified(rows: int, purpose: Purpose, device: torch.device) -> Tensor:
    """Evenly spaced numbers in [0, 1) from a random start, (rows,) float32 (VDM, arXiv 2107.00630).

    With current samples they are spaced over the batch of all ranks.
    """
    samples = current_samples()
    if samples is None:
        start = torch.rand(1, dtype=torch.float32, device=device)
        return (start + torch.arange(rows, dtype=torch.float32, device=device) / rows) % 1.0
    return samples.stratified(rows, purpose, device)
