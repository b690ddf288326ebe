"""Errors, parameter checks and the streaming base class that datasets share."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from ldm.config.instantiate import ConfigError, instantiate_from_config

logger = logging.getLogger(__name__)


class DataConfigError(ConfigError):
    """An invalid dataset parameter, in one line: the parameter, its value, the problem and the fix.

    where: YAML path of the dataset; `DataModuleFromConfig` adds it. `{param}` in `advice` becomes the parameter's path.
    """

    def __init__(self, param: str, value: object, problem: str, advice: str, where: str = "") -> None:
        self.param, self.value, self.problem, self.advice, self.where = param, value, problem, advice, where
        subject = f"{where} {param}" if where else param
        place = f"{where}.params.{param}" if where else param
        super().__init__(f"{subject} {value!r}: {problem}; {advice.replace('{param}', place)}")

    def at(self, where: str) -> DataConfigError:
        """Return the same error with the YAML path of its dataset."""
        return DataConfigError(self.param, self.value, self.problem, self.advice, where)

    def __reduce__(self) -> tuple:
        return type(self), (self.param, self.value, self.problem, self.advice, self.where)


def check_choice(param: str, value: object, choices: Iterable[str | None]) -> None:
    """Raise DataConfigError unless `value` is one of `choices`."""
    if value not in (choices := list(choices)):
        names = ", ".join(choice or "null" for choice in choices)
        raise DataConfigError(param, value, "unknown", f"set {{param}} to one of {names}")


def build_part(name: str, config: Mapping[str, Any]) -> Any:
    """Build a dataset that is part of another; errors name its parameters below `name`, and it must not be empty."""
    try:
        dataset = instantiate_from_config(config)
    except DataConfigError as error:
        param = f"{name}.params.{error.param}"
        raise DataConfigError(param, error.value, error.problem, error.advice) from error
    if getattr(dataset, "buckets", None) is not None:
        buckets, problem = (config.get("params") or {}).get("buckets"), "a part of another dataset cannot have buckets"
        if buckets is None:  # of a cache
            raise DataConfigError(name, config["target"], problem, "set {param} to a cache without them")
        raise DataConfigError(f"{name}.params.buckets", dict(buckets), problem, "remove {param}")
    if hasattr(dataset, "sample_of"):
        problem = "a cache cannot be part of another dataset"
        raise DataConfigError(name, config["target"], problem, "cache the whole, or set {param} to images")
    if not len(dataset):
        raise DataConfigError(name, config["target"], "is empty", "set {param} to a dataset with images")
    return dataset


class Txt2ImgIterableBaseDataset(IterableDataset):
    """Base of datasets that stream image-text pairs by id: a subclass implements `__iter__` over `self.valid_ids`.

    num_records: number of samples over all ranks; None means the number of ids.
    valid_ids: ids of all samples, in order; None means 0 .. num_records - 1.
    size: side of the images in pixels, for the subclass.

    `sample_ids` holds all ids, `valid_ids` those of the process that reads it: ids go to the ranks in turn (padded with
    the first ids, so that every rank gets equally many), and the ids of a rank to its data workers in turn. With the
    data module's loader these turns are batches, so that the batches do not depend on the number of workers if
    `__iter__` keeps the order of the ids. It sets `seed` and `epoch` before each pass, for subclasses that shuffle.
    """

    def __init__(self, num_records: int | None = None, valid_ids: Sequence[Any] | None = None, size: int = 256) -> None:
        super().__init__()
        self.sample_ids: Sequence[Any] = range(num_records or 0) if valid_ids is None else valid_ids
        self.num_records = len(self.sample_ids) if num_records is None else num_records
        self.size = size
        self.rank, self.world_size = 0, 1
        self.seed, self.epoch = 0, 0
        self._batch_size, self._skipped = 1, 0
        self._assigned_ids: Sequence[Any] | None = None
        logger.info("%s: %d samples", type(self).__name__, len(self))

    def set_shard(self, rank: int, world_size: int) -> None:
        """Set the rank of this process; the data module calls it, since data workers cannot always know it."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank}: expected 0 .. {world_size - 1} with world_size {world_size}")
        self.rank, self.world_size = rank, world_size

    def set_epoch(self, seed: int, epoch: int) -> None:
        self.seed, self.epoch = seed, epoch

    def set_batches(self, batch_size: int, skipped: int = 0) -> None:
        """Set the number of ids that a data worker gets in turn, and how many of the first ids are left out."""
        self._batch_size, self._skipped = batch_size, skipped

    def share(self, worker: int, num_workers: int) -> Sequence[Any]:
        """Return the ids of one data worker of this rank."""
        ids = self.sample_ids[self._skipped :]
        if missing := -len(ids) % self.world_size:
            ids = [*ids, *(ids[i % len(ids)] for i in range(missing))]
        ids, size = ids[self.rank :: self.world_size], self._batch_size
        if num_workers == 1 or size == 1:
            return ids[worker::num_workers]
        starts = range(worker * size, len(ids), num_workers * size)
        return [each for start in starts for each in ids[start : start + size]]

    @property
    def valid_ids(self) -> Sequence[Any]:
        if self._assigned_ids is not None:
            return self._assigned_ids
        info = get_worker_info()
        return self.share(info.id, info.num_workers) if info is not None else self.share(0, 1)

    @valid_ids.setter
    def valid_ids(self, ids: Sequence[Any]) -> None:
        self._assigned_ids = ids  # published worker_init functions split the ids themselves

    def __len__(self) -> int:
        """Return the number of samples of one rank."""
        return -(-self.num_records // self.world_size)

    @abstractmethod
    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the samples of `self.valid_ids`."""
