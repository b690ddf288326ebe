"""Which sample comes when, and with which random numbers: functions of (seed, epoch, index) alone.

Neither the number of data workers nor an interruption changes them: the order of an epoch is computed from (seed, epoch), and the
generators of Python, NumPy and PyTorch are seeded for every sample, so that a dataset may use any of them.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from ldm.data.base import Txt2ImgIterableBaseDataset
from ldm.rng import generators_kept

ORDER, SAMPLE, WORKERS = 1, 2, 3  # purposes of random numbers


class Position(NamedTuple):
    """A place in the data: `batch` batches of epoch `epoch` have been used."""

    epoch: int
    batch: int


def mix(*numbers: int) -> int:
    """Integers -> one of 63 bits that looks independent for every other input (BLAKE2b)."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def epoch_order(length: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Indices 0 .. length - 1 in the order of that epoch -> (length,) int64."""
    if not shuffle:
        return np.arange(length)
    key = mix(seed, ORDER, epoch)
    # RandomState and not Generator: NumPy guarantees its stream across versions, so that old runs resume exactly.
    return np.random.RandomState([key & 0xFFFFFFFF, key >> 32]).permutation(length)


class EpochSampler(DistributedSampler):
    """(epoch, index) pairs of one rank in the order of the epoch, from a position on.

    Rank r takes every world_size-th index from r on, so that batch b of all ranks together is the b-th slice of the order. Where the length
    is no multiple, the last round is filled from the front of the order. A DistributedSampler by type, so that Lightning leaves it alone.

    position: asked when a pass begins; without it, or where it gives None, a pass is the whole epoch that `set_epoch` named.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[], Position | None] | None = None,
    ) -> None:
        # The parent's constructor is left out: it wants the dataset, and all that it sets is set here.
        self.length, self.batch_size, self.seed, self.shuffle, self.position = (
            length,
            batch_size,
            seed,
            shuffle,
            position,
        )
        self.rank, self.num_replicas = rank, world_size
        self.num_samples = math.ceil(length / world_size)
        self.total_size = self.num_samples * world_size
        self.drop_last = False
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, batch = (self.position() if self.position is not None else None) or Position(self.epoch, 0)
        order = np.resize(epoch_order(self.length, self.seed, epoch, self.shuffle), self.total_size)
        own = order[self.rank :: self.num_replicas][batch * self.batch_size :]
        return iter([(epoch, index) for index in own.tolist()])

    def __len__(self) -> int:
        return self.num_samples  # of a whole epoch, resumed or not: Lightning counts batches against it


class SeededDataset(Dataset):
    """A map-style dataset whose samples draw their random numbers from (seed, epoch, index) alone; plain indices mean epoch 0.

    repeat: every epoch draws the same (validation).
    """

    def __init__(self, dataset: Dataset, seed: int, repeat: bool = False) -> None:
        self.dataset, self.seed, self.repeat = dataset, seed, repeat

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[int | tuple[int, int]]) -> list[Any]:
        with _generators_kept():
            return [self._draw(*key) if isinstance(key, tuple) else self._draw(0, key) for key in keys]

    def _draw(self, epoch: int, index: int) -> Any:
        _seed_generators(mix(self.seed, SAMPLE, 0 if self.repeat else epoch, index))
        return self.dataset[index]


class StreamLoader(DataLoader):
    """A DataLoader of a stream: the stream is read from the start of its epoch, and the batches that were used are passed over."""

    position: Callable[[], Position | None] | None = None
    seed: int = 0

    def __iter__(self) -> Iterator[Any]:
        epoch, batch = (self.position() if self.position is not None else None) or Position(0, 0)
        if isinstance(self.dataset, Txt2ImgIterableBaseDataset):
            self.dataset.set_epoch(self.seed, epoch)
        self.generator = torch.Generator().manual_seed(mix(self.seed, WORKERS, epoch))  # gives the workers their seeds
        batches = super().__iter__()
        for _ in range(batch):
            next(batches, None)
        return batches

    def __len__(self) -> int:
        if not isinstance(self.dataset, Txt2ImgIterableBaseDataset):
            return super().__len__()
        workers = max(1, self.num_workers)
        return sum(math.ceil(len(self.dataset.share(worker, workers)) / self.batch_size) for worker in range(workers))


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Global generators as they were afterwards; a data worker's belong to its samples alone."""
    if get_worker_info() is not None:
        yield
        return
    with generators_kept():
        yield
