"""Order and random numbers of the samples, as functions of (seed, epoch, index) alone.

They depend neither on the number of data workers nor on interruptions: (seed, epoch) gives the order of an epoch, and
the generators of Python, NumPy and PyTorch are seeded for every sample, so a dataset may use any of them.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler, get_worker_info
from torch.utils.data.dataloader import _BaseDataLoaderIter

from ldm.data.base import Txt2ImgIterableBaseDataset
from ldm.data.workers import Loader
from ldm.rng import preserve_rng

ORDER, SAMPLE, WORKERS = 1, 2, 3  # purposes of random numbers


class Position(NamedTuple):
    """A place in the data: `batch` batches of epoch `epoch` have been used."""

    epoch: int
    batch: int


def mix(*numbers: int) -> int:
    """Hash integers to 63 bits that look independent for every other input (BLAKE2b)."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def epoch_order(length: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Return the indices 0 .. length - 1 in the order of the epoch -> (length,) int64."""
    if not shuffle:
        return np.arange(length)
    key = mix(seed, ORDER, epoch)
    # RandomState and not Generator: NumPy guarantees its stream across versions, so old runs resume exactly.
    return np.random.RandomState([key & 0xFFFFFFFF, key >> 32]).permutation(length)


class EpochSampler(DistributedSampler):
    """(epoch, index) pairs of one rank in the order of the epoch, starting from a position.

    Rank r takes every world_size-th index from r on, so batch b of all ranks together is the b-th slice of the order.
    The last round is filled from the front of the order. Lightning does not replace a DistributedSampler.

    position: called when a pass begins; without one, a pass is the whole epoch given by `set_epoch`.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[], Position | None] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.length, self.batch_size, self.position = len(dataset), batch_size, position

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, batch = (self.position() if self.position is not None else None) or Position(self.epoch, 0)
        order = np.resize(epoch_order(self.length, self.seed, epoch, self.shuffle), self.total_size)
        own = order[self.rank :: self.num_replicas][batch * self.batch_size :]
        return iter([(epoch, index) for index in own.tolist()])

    def __len__(self) -> int:
        return self.num_samples  # of a whole epoch, resumed or not: Lightning counts batches against it


class SeededDataset(Dataset):
    """A map-style dataset, read by (epoch, index), whose random numbers follow from (seed, epoch, index) alone.

    A plain index means epoch 0.
    repeat: use the random numbers of epoch 0 in every epoch (validation).
    """

    def __init__(self, dataset: Any, seed: int, repeat: bool = False) -> None:
        self.dataset, self.seed, self.repeat = dataset, seed, repeat

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[int | tuple[int, int]]) -> list[Any]:
        # In a data worker the global generators belong to the samples alone.
        with preserve_rng() if get_worker_info() is None else nullcontext():
            return [self._sample(*key) if isinstance(key, tuple) else self._sample(0, key) for key in keys]

    def _sample(self, epoch: int, index: int) -> Any:
        seed = mix(self.seed, SAMPLE, 0 if self.repeat else epoch, index)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.default_generator.manual_seed(seed)
        return self.dataset[index]


class StreamLoader(Loader):
    """A DataLoader of a stream that reads it from the start of the epoch and skips the batches already used."""

    position: Callable[[], Position | None] | None = None
    seed: int = 0

    def __iter__(self) -> _BaseDataLoaderIter:
        epoch, batch = (self.position() if self.position is not None else None) or Position(0, 0)
        if isinstance(self.dataset, Txt2ImgIterableBaseDataset):
            self.dataset.set_epoch(self.seed, epoch)
        self.generator = torch.Generator().manual_seed(mix(self.seed, WORKERS, epoch))  # seeds the workers
        batches = super().__iter__()
        for _ in range(batch):
            next(batches, None)
        return batches

    def __len__(self) -> int:
        if not isinstance(self.dataset, Txt2ImgIterableBaseDataset):
            return super().__len__()
        workers, size = max(1, self.num_workers), self.batch_size or 1
        return sum(math.ceil(len(self.dataset.share(worker, workers)) / size) for worker in range(workers))


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
