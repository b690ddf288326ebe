"""Errors, parameter checks and the streaming base class that datasets share."""

from __future__ import annotations

import inspect
import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ldm.config.instantiate import ConfigError, get_obj_from_str, instantiate_from_config
from ldm.rng import preserve_rng

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


def prepare(config: Any) -> None:
    """Call `prepare_data` (unpack, download) of a dataset's class, if it has it; building reports an invalid config."""
    try:
        prepare_data = getattr(get_obj_from_str(config["target"]), "prepare_data", None)
        params = dict(config.get("params") or {})
        if prepare_data is not None:
            inspect.signature(prepare_data).bind(**params)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError):
        return
    if prepare_data is not None:
        prepare_data(**params)


@contextmanager
def part_errors(name: str) -> Iterator[None]:
    """Prefix the parameters in errors of a dataset with `name`, its place in the dataset that reads it."""
    try:
        yield
    except DataConfigError as error:
        raise DataConfigError(f"{name}.params.{error.param}", error.value, error.problem, error.advice) from error
    except ConfigError as error:
        raise ConfigError(f"{name}.{error}") from error


class CombinedDataset(Dataset):
    """Base of datasets that read others; an item holds the keys that items of all have.

    parts: these datasets, by the path of their configs in the parameters, such as `datasets[0]`.
    class_names: those of all parts, which must number their classes alike; None if a part has no classes.
    A subclass has `__len__`, and `_place` to say where a sample is.
    """

    def __init__(self, configs: Mapping[str, Any]) -> None:
        self.parts = {name: _build_part(name, config) for name, config in configs.items()}
        with preserve_rng():
            items = {name: part[0] for name, part in self.parts.items()}
        self.keys = sorted(set.intersection(*map(set, items.values())))
        self.class_names: list[str] | None = None
        first = next(iter(self.parts))
        for name in self.parts:
            self._compare(configs[name]["target"], first, name, items[first], items[name])
        if all(getattr(part, "class_names", None) for part in self.parts.values()):
            self.class_names = list(self.parts[first].class_names)
        if left := sorted(set.union(*map(set, items.values())) - {*self.keys}):
            logger.info("not in the samples, because some of the datasets lack it: %s", ", ".join(left))

    @abstractmethod
    def _place(self, index: int) -> tuple[str, int]:
        """Return the name of the part that holds a sample, and the index of the sample there."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, own = self._place(index)
        sample = self.parts[name][own]
        return {key: sample[key] for key in self.keys}

    def file_of(self, index: int) -> Path | str:
        """Return the file of a sample, or its index if the part has no files."""
        name, own = self._place(index)
        part = self.parts[name]
        return part.file_of(own) if hasattr(part, "file_of") else f"sample {own} of {name}"

    @property
    def fingerprint(self) -> dict[str, int | str]:
        """The fingerprints of the parts that have one."""
        each = ((name, getattr(part, "fingerprint", {})) for name, part in self.parts.items())
        return {f"{name} {key}": value for name, values in each for key, value in values.items()}

    def _compare(self, target: str, first: str, name: str, before: Mapping[str, Any], item: Mapping[str, Any]) -> None:
        """Raise DataConfigError unless the images and classes of a part fit those of the first one."""
        images = [{key for key, value in each.items() if getattr(value, "ndim", 0) > 1} for each in (before, item)]
        if images[0] and images[1] and not images[0] & images[1]:
            keys = [", ".join(sorted(each)) for each in images]
            problem = f"its images have the keys {keys[1]}, those of {first} {keys[0]}"
            raise DataConfigError(name, target, problem, "set {param}.params.image_key as in the others")
        for key in sorted(images[0] & images[1]):
            shapes = tuple(before[key].shape), tuple(item[key].shape)
            if shapes[0] != shapes[1]:
                problem = f"its {key!r} is {shapes[1]}, that of {first} {shapes[0]}"
                raise DataConfigError(name, target, problem, "set {param}.params.size as in the others")
        names = [list(getattr(self.parts[each], "class_names", None) or ()) for each in (first, name)]
        if names[0] and names[1] and names[0] != names[1] and "class_label" in self.keys:
            odd = ", ".join(sorted(set(names[0]) ^ set(names[1]))[:5]) or "their order"
            problem = f"has {len(names[1])} classes and {first} {len(names[0])}, which differ in {odd}"
            raise DataConfigError(name, target, problem, "set {param}.params.classes to one list of names in all")


def leaves(dataset: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield (YAML path, dataset) of each dataset that `dataset`, at `place`, is combined from, or of itself."""
    if not isinstance(dataset, CombinedDataset):
        yield place, dataset
        return
    for name, part in dataset.parts.items():
        yield from leaves(part, f"{place}.params.{name}")


def _build_part(name: str, config: Any) -> Any:
    """Build a dataset that is part of another; it must not be empty, in buckets, or a cache."""
    if not isinstance(config, Mapping) or "target" not in config:
        raise DataConfigError(name, config, "has no target", "set {param} to {target: ..., params: {...}}")
    with part_errors(name):
        dataset = instantiate_from_config(config)
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
