"""Order and random numbers of the samples, as functions of (seed, epoch, index) alone.

They depend neither on the number of data workers nor on interruptions: (seed, epoch) gives the order of an epoch, and
the generators of Python, NumPy and PyTorch are seeded for every sample, so a dataset may use any of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler, IterableDataset, get_worker_info
from torch.utils.data.dataloader import _BaseDataLoaderIter

from ldm.data.base import Txt2ImgIterableBaseDataset
from ldm.data.workers import Loader
from ldm.rng import mix, preserve_rng, seed_generators

ORDER, SAMPLE, WORKERS = 1, 2, 3  # purposes of random numbers


class Position(NamedTuple):
    """A place in the data: the first `samples` samples of epoch `epoch` have been used, by all ranks together."""

    epoch: int
    samples: int


class Slice(NamedTuple):
    """A rank's part of a batch of all ranks."""

    indices: list[int]
    size: int  # number of these that count: all, or 0 if the only one fills the batch
    total: int  # of all ranks


def order_generator(seed: int, epoch: int) -> np.random.RandomState:
    """Return the generator of the order of an epoch."""
    key = mix(seed, ORDER, epoch)
    # RandomState and not Generator: NumPy guarantees its stream across versions, so old runs resume exactly.
    return np.random.RandomState([key & 0xFFFFFFFF, key >> 32])


def epoch_order(length: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Return the indices 0 .. length - 1 in the order of the epoch -> (length,) int64."""
    return order_generator(seed, epoch).permutation(length) if shuffle else np.arange(length)


def lane_order(lengths: Sequence[int], lanes: int, seed: int, epoch: int) -> np.ndarray:
    """Return the indices of the samples of shards of these lengths in a random order -> (sum of lengths,) int64.

    All shards in a random order, the samples of each permuted, are cut into lanes of equal length, which are read side
    by side: one sample from each in turn. Rank r of w takes every w-th index from r on: if w divides the number of
    lanes, these are lanes of its own, and only a shard that is cut is read by two ranks.
    """
    random, starts = order_generator(seed, epoch), np.cumsum([0, *lengths])
    samples = [starts[shard] + random.permutation(lengths[shard]) for shard in random.permutation(len(lengths))]
    lanes = min(lanes, len(lengths))
    order = np.concatenate([*samples, np.full(-starts[-1] % lanes, -1)]).reshape(lanes, -1).T.ravel()
    return order[order >= 0]


def order_of(dataset: Any, seed: int, epoch: int, batch: int, shuffle: bool) -> np.ndarray:
    """Return the indices of a dataset in the order of the epoch -> (len(dataset),) int64.

    If the dataset has a method `order(seed, epoch, batch, shuffle)`, it returns them, len(dataset) different ones; else
    `epoch_order` does. batch: number of samples in a batch of all ranks.
    """
    if not hasattr(dataset, "order"):
        return epoch_order(len(dataset), seed, epoch, shuffle)
    order = dataset.order(seed, epoch, batch, shuffle)
    if len(order) != len(dataset):
        problem = f"{type(dataset).__name__}.order has {len(order)} indices for {len(dataset)} samples"
        raise ValueError(f"{problem}; it must name each sample of the epoch once")
    return order


class EpochSampler(DistributedSampler):
    """(epoch, index) pairs of one rank in the order of the epoch, starting from a position.

    Rank r takes every world_size-th index from r on, so a batch of all ranks together is a slice of the order, whatever
    their number. All ranks get equally many batches: one that would have no sample of the last slice gets the first
    index of the order, which `slice_at` does not count. Lightning does not replace a DistributedSampler.

    A dataset may have an order of its own (shards kept together, batches of one size), see `order_of`.

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
        if hasattr(dataset, "set_batch"):  # of images in buckets; data workers get the dataset as it is now
            dataset.set_batch(batch_size * world_size)
        self._order = -1, np.arange(0)  # an epoch and its order

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, start = (self.position() if self.position is not None else None) or Position(self.epoch, 0)
        step = self.batch_size * self.num_replicas
        places = [Position(epoch, samples) for samples in range(start, self.length, step)]
        return ((epoch, index) for place in places for index in self.slice_at(place).indices)

    def slice_at(self, position: Position) -> Slice:
        """Return the batch of this rank at a position."""
        epoch, start = position
        if self._order[0] != epoch:
            step = self.batch_size * self.num_replicas
            self._order = epoch, order_of(self.dataset, self.seed, epoch, step, self.shuffle)
        order = self._order[1]
        together = order[start : start + self.batch_size * self.num_replicas]
        own = together[self.rank :: self.num_replicas].tolist()
        return Slice(own or [int(order[0])], len(own), len(together))

    def __len__(self) -> int:
        return self.num_samples  # of a whole epoch, resumed or not: Lightning counts batches against it


class SeededDataset(Dataset):
    """A map-style dataset, read by (epoch, index), whose random numbers follow from (seed, epoch, index) alone.

    A plain index means epoch 0.
    repeat: use the random numbers of epoch 0 in every epoch (validation).
    """

    def __init__(self, dataset: Any, seed: int, repeat: bool = False) -> None:
        self.dataset, self.seed, self.repeat = dataset, seed, repeat
        self._read = getattr(dataset, "sample_of", None)  # (epoch, index) -> sample, of datasets that know the epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[int | tuple[int, int]]) -> list[Any]:
        # In a data worker the global generators belong to the samples alone.
        with preserve_rng() if get_worker_info() is None else nullcontext():
            return [self._sample(*key) if isinstance(key, tuple) else self._sample(0, key) for key in keys]

    def _sample(self, epoch: int, index: int) -> Any:
        epoch = 0 if self.repeat else epoch
        _seed_sample(self.seed, epoch, index)
        return self.dataset[index] if self._read is None else self._read(epoch, index)


def _seed_sample(seed: int, epoch: int, index: int) -> None:
    seed_generators(mix(seed, SAMPLE, epoch, index), all_devices=False)


class SeededStream(IterableDataset):
    """A stream whose random numbers follow from (seed, epoch, place in the stream), as those of a SeededDataset."""

    def __init__(self, stream: IterableDataset, seed: int, batch_size: int, rank: int, world_size: int) -> None:
        self.stream, self.seed, self.batch_size, self.rank, self.world_size = stream, seed, batch_size, rank, world_size
        self.epoch, self.skipped = 0, 0  # of this pass; the first `skipped` samples are left out

    def __len__(self) -> int:
        return len(self.stream)  # type: ignore[arg-type]  # TypeError if its length is unknown

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        samples, read = None, 0
        while True:
            batch, row = divmod(read, self.batch_size)
            place = self.skipped + ((batch * workers + number) * self.batch_size + row) * self.world_size + self.rank
            with preserve_rng() if worker is None else nullcontext():
                _seed_sample(self.seed, self.epoch, place)
                try:
                    samples = iter(self.stream) if samples is None else samples
                    sample = next(samples)
                except StopIteration:
                    return
            yield sample
            read += 1


class StreamLoader(Loader):
    """A DataLoader of a stream that reads it from the start of the epoch and skips the batches already used.

    The batches of a Txt2ImgIterableBaseDataset do not depend on the number of workers: each worker gets the ids of
    whole batches. After a resume with another batch size, ids that do not fill a batch of the new size are left out.
    """

    def __init__(
        self,
        stream: IterableDataset,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[], Position | None] | None = None,
        **options: Any,
    ) -> None:
        self.stream, self.seed, self.rank, self.world_size, self.position = stream, seed, rank, world_size, position
        self.step = batch_size * world_size  # samples of a batch of all ranks
        self.seeded = SeededStream(stream, seed, batch_size, rank, world_size)
        super().__init__(self.seeded, batch_size, **options)

    def __iter__(self) -> _BaseDataLoaderIter:
        epoch, samples = (self.position() if self.position is not None else None) or Position(0, 0)
        batches, skipped = divmod(samples, self.step)
        self.seeded.epoch, self.seeded.skipped = epoch, skipped
        if isinstance(self.stream, Txt2ImgIterableBaseDataset):
            self.stream.set_epoch(self.seed, epoch)
            self.stream.set_batches(self.batch_size or 1, skipped)
        self.generator = torch.Generator().manual_seed(mix(self.seed, WORKERS, epoch))  # seeds the workers
        iterator = super().__iter__()
        for _ in range(batches):
            next(iterator, None)
        return iterator

    @property
    def length(self) -> int | None:
        """Number of samples of all ranks, those that fill the last round included; None if unknown."""
        ids = self.stream.sample_ids if isinstance(self.stream, Txt2ImgIterableBaseDataset) else ()
        return math.ceil(len(ids) / self.world_size) * self.world_size if len(ids) else None

    def slice_at(self, position: Position) -> Slice:
        """Return the batch of this rank at a position, as places in the stream."""
        end = position.samples + self.step
        end = end if self.length is None else min(end, self.length)
        places = list(range(position.samples + self.rank, end, self.world_size))
        return Slice(places, len(places), len(places) * self.world_size)

    def __len__(self) -> int:
        return super().__len__() if self.length is None else math.ceil(self.length / self.step)


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
