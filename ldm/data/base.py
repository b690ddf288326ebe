"""What datasets share: the error for a config that cannot be used, and the base of datasets that stream."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from ldm.config.instantiate import ConfigError

logger = logging.getLogger(__name__)


class DataConfigError(ConfigError):
    """A dataset's parameter that cannot be used: one line with the parameter, its value, what is wrong and what to do.

    Datasets name their own parameter; `DataModuleFromConfig` adds where it stands in the YAML. `{param}` in `advice` becomes that place.
    """

    def __init__(self, param: str, value: object, problem: str, advice: str, where: str = "") -> None:
        self.param, self.value, self.problem, self.advice, self.where = param, value, problem, advice, where
        subject = f"{where} {param}" if where else param
        place = f"{where}.params.{param}" if where else param
        super().__init__(f"{subject} {value!r}: {problem}; {advice.replace('{param}', place)}")

    def at(self, where: str) -> DataConfigError:
        """The same error, with the YAML path of its dataset."""
        return DataConfigError(self.param, self.value, self.problem, self.advice, where)

    def __reduce__(self) -> tuple:
        return type(self), (self.param, self.value, self.problem, self.advice, self.where)


class Txt2ImgIterableBaseDataset(IterableDataset):
    """Base of datasets that stream image-text pairs by id: a subclass writes `__iter__` over `self.valid_ids`.

    num_records: number of samples (of all ranks together); None takes the number of ids.
    valid_ids: ids of all samples, in order; None stands for 0 .. num_records - 1.
    size: side of the pictures in pixels, for the subclass.

    `sample_ids` are all ids. `valid_ids` are the share of the process that reads the attribute: ids are dealt to the ranks in turn (padded
    from the front so that every rank gets equally many), and a rank's ids to its data workers in turn. The data module sets `seed` and
    `epoch` before each pass, for subclasses that shuffle. The batches of a stream depend on the number of workers: each fills its own.
    """

    def __init__(self, num_records: int | None = None, valid_ids: Sequence[Any] | None = None, size: int = 256) -> None:
        super().__init__()
        if valid_ids is None:
            valid_ids = range(num_records or 0)
        self.num_records = len(valid_ids) if num_records is None else num_records
        self.sample_ids = valid_ids
        self.size = size
        self.rank, self.world_size = 0, 1
        self.seed, self.epoch = 0, 0
        self._own_ids: Sequence[Any] | None = None
        logger.info("%s has %d samples", type(self).__name__, len(self))

    def set_shard(self, rank: int, world_size: int) -> None:
        """Which of how many ranks this process is; the data module calls it, since data workers cannot always know."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank}: expected 0 .. {world_size - 1} with world_size {world_size}")
        self.rank, self.world_size = rank, world_size

    def set_epoch(self, seed: int, epoch: int) -> None:
        """What the order of the coming pass may depend on."""
        self.seed, self.epoch = seed, epoch

    def share(self, worker: int, num_workers: int) -> Sequence[Any]:
        """Ids of one data worker of this rank."""
        ids = self.sample_ids
        if missing := -len(ids) % self.world_size:
            ids = [*ids, *(ids[i % len(ids)] for i in range(missing))]
        return ids[self.rank :: self.world_size][worker::num_workers]

    @property
    def valid_ids(self) -> Sequence[Any]:
        if self._own_ids is not None:
            return self._own_ids
        info = get_worker_info()
        return self.share(info.id, info.num_workers) if info is not None else self.share(0, 1)

    @valid_ids.setter
    def valid_ids(self, ids: Sequence[Any]) -> None:
        self._own_ids = ids  # published worker_init functions deal ids out themselves

    def __len__(self) -> int:
        """Samples of one rank."""
        return -(-self.num_records // self.world_size)

    @abstractmethod
    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Samples of `self.valid_ids`."""
