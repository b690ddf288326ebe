"""Datasets from a config, with loaders whose order depends on (seed, epoch) alone and that resume within an epoch."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.loops.progress import _ProcessedTracker
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ldm.config.instantiate import ConfigError, get_obj_from_str, instantiate_from_config
from ldm.data.base import DataConfigError, Txt2ImgIterableBaseDataset
from ldm.data.folder import ImageFolder
from ldm.data.order import EpochSampler, Position, SeededDataset, StreamLoader, usable_cpus
from ldm.data.splits import split_of
from ldm.data.workers import Loader, Traced

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test", "predict")
_CLASSES_SHOWN = 20  # in the log


class WrappedDataset(Dataset):
    """Any object with `__len__` and `__getitem__` as a PyTorch dataset."""

    def __init__(self, dataset: Any) -> None:
        self.data = dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class DataModuleFromConfig(pl.LightningDataModule):
    """The datasets of a YAML and their loaders.

    batch_size: samples per batch and rank; the last batch of an epoch may be smaller.
    train, validation, test, predict: configs of the datasets; each is built once.
    wrap: wrap each dataset in WrappedDataset.
    num_workers: data workers per loader and rank; None is the published 2 * batch_size, at most the rank's CPUs.
    shuffle_test_loader, shuffle_val_dataloader: shuffle these too; training data is always shuffled, except a stream.
    use_worker_init_fn: published, without effect: workers are always seeded, and streams always split among them.

    `seed` is set before `fit`. The order of the samples and the random numbers of each are functions of (seed, epoch,
    index); validation, test and predict use the same ones in every epoch. Checkpoints hold the position, counted in
    batches trained on, so a resumed run gets the same batches as an uninterrupted one.

    Checkpoints also hold the class names and a fingerprint of each dataset. At resume, a change of the data is logged,
    and refused if `strict` is set; class numbers that changed are always refused.
    """

    def __init__(
        self,
        batch_size: int,
        train: Any = None,
        validation: Any = None,
        test: Any = None,
        predict: Any = None,
        wrap: bool = False,
        num_workers: int | None = None,
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
    ) -> None:
        super().__init__()
        _check_count("batch_size", batch_size, 1)
        if num_workers is not None:
            _check_count("num_workers", num_workers, 0)
        self.batch_size = batch_size
        self.num_workers = num_workers if num_workers is not None else min(2 * batch_size, usable_cpus())
        self.wrap = wrap
        self.use_worker_init_fn = use_worker_init_fn
        self.seed = 23
        self.strict = False
        configs = zip(SPLITS, (train, validation, test, predict))
        self.dataset_configs = {split: config for split, config in configs if config is not None}
        self.datasets: dict[str, Any] = {}
        self._default_workers = num_workers is None
        self._shuffle = {"train": True, "validation": shuffle_val_dataloader, "test": shuffle_test_loader}
        self._start, self._trained_before = Position(0, 0), 0  # of this fit: its position, batches trained on before
        # Lightning uses a hook if it is overridden: only splits with a config override theirs.
        for split in self.dataset_configs:
            hook = "val_dataloader" if split == "validation" else f"{split}_dataloader"
            setattr(self, hook, partial(self._loader, split))

    def prepare_data(self) -> None:
        """Call `prepare_data` (unpack, download) of the datasets that have it, before they are built.

        main and Lightning both call it, in one process per machine; datasets skip what is done already.
        """
        for split, config in self.dataset_configs.items():
            if split not in self.datasets and (prepare := _preparation(config)) is not None:
                with _located(split):
                    prepare(**(config.get("params") or {}))

    def setup(self, stage: str | None = None) -> None:
        """Build the datasets that are not built yet; main and Lightning both call it."""
        self._start, self._trained_before = Position(0, 0), 0  # unless load_state_dict sets others
        new = {split: config for split, config in self.dataset_configs.items() if split not in self.datasets}
        for split, config in new.items():
            with _located(split):
                dataset = instantiate_from_config(config)
            self.datasets[split] = WrappedDataset(dataset) if self.wrap else dataset
        _check_classes(self.datasets)
        _check_training_data(self.datasets)
        if new and self.class_names:
            shown = ", ".join(f"{number} {name}" for number, name in enumerate(self.class_names[:_CLASSES_SHOWN]))
            more = f", ... {len(self.class_names)} in all" if len(self.class_names) > _CLASSES_SHOWN else ""
            logger.info("%-11s %s%s", "classes", shown, more)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes by number, from the first dataset that has them; empty without classes."""
        return next((list(names) for data in self.datasets.values() if (names := _class_names(data))), [])

    def state_dict(self) -> dict[str, Any]:
        """Return the seed, the position counted in batches trained on, and the data; empty outside of `fit`."""
        trainer = self.trainer
        if trainer is None or trainer.state.fn != "fit" or (position := self._position()) is None:
            return {}
        return {
            "seed": self.seed,
            "epoch": position.epoch,
            "batch": position.batch,
            "trained": _processed(trainer.fit_loop.epoch_loop.batch_progress.total),
            "global_batch_size": self._global_batch_size(),
            "class_names": self.class_names,
            "datasets": {split: _fingerprint(dataset) for split, dataset in self.datasets.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved position with its seed; raise ConfigError for data that may not have changed."""
        if not state_dict:
            return
        _check_class_numbers(state_dict.get("class_names", []), self.class_names)
        self._compare_data(state_dict.get("datasets", {}))
        saved_size, size, seed = state_dict["global_batch_size"], self._global_batch_size(), state_dict["seed"]
        if saved_size != size:
            problem = f"batch size {size}, previously {saved_size}: the epoch continues after the used samples"
            logger.warning("%-11s %s", "data", problem)
        if seed != self.seed:
            logger.warning("%-11s the order keeps the checkpoint's seed %d, not %d", "data", seed, self.seed)
            self.seed = seed
        self._start = Position(state_dict["epoch"], state_dict["batch"] * saved_size // size)
        self._trained_before = state_dict["trained"]
        logger.info("%-11s continuing in epoch %d after %d batches", "data", *self._start)
        # Lightning expects the loader to support resuming; here the data module does.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")

    def _compare_data(self, saved: Mapping[str, Mapping[str, int | str]]) -> None:
        """Log datasets that differ from their saved fingerprints; raise ConfigError if `strict`."""
        for split in saved.keys() & self.datasets.keys():
            before, now = saved[split], _fingerprint(self.datasets[split])
            if changed := [key for key in before if before[key] != now.get(key)]:
                change = f"other {' and '.join(changed)} than when the checkpoint was saved"
                problem = f"data.params.{split}: {change} ({now['samples']} samples, previously {before['samples']})"
                if self.strict:
                    raise ConfigError(f"{problem}; restore them, or resume without --strict-data")
                if split == "train" and changed != ["labels"]:
                    problem += "; the rest of this epoch may repeat or miss samples"
                logger.warning("%-11s %s", "data", problem)

    def _loader(self, split: str) -> DataLoader:
        if split not in self.datasets:
            self.setup()
        dataset = self.datasets[split]
        rank, world_size = self._ranks()
        position = self._position if split == "train" else None
        workers = self._workers()
        on_cuda = self.trainer is not None and isinstance(self.trainer.accelerator, CUDAAccelerator)
        options: dict[str, Any] = {"batch_size": self.batch_size, "num_workers": workers, "pin_memory": on_cuda}
        if isinstance(dataset, IterableDataset):
            _shard_stream(dataset, rank, world_size, workers)
            stream = StreamLoader(dataset, **options)
            stream.seed, stream.position = self.seed, position
            return stream
        if not len(dataset):
            raise ConfigError(f"data.params.{split}: {type(dataset).__name__} is empty")
        shuffle = self._shuffle.get(split, False)
        sampler = EpochSampler(dataset, self.batch_size, self.seed, shuffle, rank, world_size, position)
        # Its own generator seeds the workers: the global one belongs to the training.
        options["generator"] = torch.Generator().manual_seed(self.seed)
        seeded: Dataset = SeededDataset(dataset, self.seed, repeat=split != "train")
        return Loader(Traced(seeded, workers) if workers else seeded, sampler=sampler, **options)

    def _position(self) -> Position | None:
        """Return the position of the next training batch; None without a trainer.

        Counted in batches trained on, not in Lightning's epochs: Lightning starts its first pass before it sets the
        epoch, closes an epoch that max_steps cut short, and counts a checkpoint at the end of an epoch in several ways.
        """
        if self.trainer is None:
            return None
        loop = self.trainer.fit_loop
        since = _processed(loop.epoch_loop.batch_progress.total) - self._trained_before
        if since == 0:
            return self._start
        if math.isfinite(loop.max_batches):
            passes, batch = divmod(self._start.batch + since, int(loop.max_batches))
            return Position(self._start.epoch + passes, batch)
        epochs = loop.epoch_progress.current  # a stream of unknown length: only Lightning knows when it ended
        epoch = _processed(epochs)
        return Position(epoch, _processed(loop.epoch_loop.batch_progress.current) if epochs.ready > epoch else 0)

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _global_batch_size(self) -> int:
        return self.batch_size * self._ranks()[1]

    def _workers(self) -> int:
        if self._default_workers and self.trainer is not None:
            return max(1, min(self.num_workers, usable_cpus() // self.trainer.num_devices))
        return self.num_workers


def _processed(tracker: object) -> int:
    assert isinstance(tracker, _ProcessedTracker)  # the declared type of Lightning's attributes is a base class
    return tracker.processed


def _preparation(config: Any) -> Callable[..., None] | None:
    """Return the `prepare_data` of a dataset's class, or None; `setup` reports an invalid config."""
    try:
        return getattr(get_obj_from_str(config["target"]), "prepare_data", None)
    except (ConfigError, KeyError, TypeError):
        return None


@contextmanager
def _located(split: str) -> Iterator[None]:
    """Add the YAML path of a dataset to its errors."""
    try:
        yield
    except DataConfigError as error:
        raise error.at(f"data.params.{split}") from error


def _check_count(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigError(f"data.params.{name} {value!r}: expected an integer of at least {minimum}")


def _unwrapped(dataset: Any) -> Any:
    return dataset.data if isinstance(dataset, WrappedDataset) else dataset


def _class_names(dataset: Any) -> Sequence[str] | None:
    return getattr(_unwrapped(dataset), "class_names", None)


def _fingerprint(dataset: Any) -> dict[str, int | str]:
    """Return the number of `samples` of a dataset, and what its own `fingerprint` tells apart."""
    dataset = _unwrapped(dataset)
    count = getattr(dataset, "num_records", None)  # of a stream, over all ranks
    if count is None:
        count = len(dataset) if hasattr(dataset, "__len__") else -1
    return {"samples": count, **getattr(dataset, "fingerprint", {})}


def _check_class_numbers(before: Sequence[str], now: Sequence[str]) -> None:
    """Raise ConfigError if classes of a resumed run have other numbers; new ones at the end are allowed."""
    if not before or not now or list(now[: len(before)]) == list(before):
        return
    number = next((k for k, pair in enumerate(zip(before, now)) if pair[0] != pair[1]), len(now))
    present = repr(now[number]) if number < len(now) else "missing"
    raise ConfigError(
        f"data: class {number} is {present}, but was {before[number]!r} when the checkpoint was saved; "
        "set data.params.train.params.classes, and that of validation, to the run's configs/classes.txt"
    )


def _check_classes(datasets: Mapping[str, Any]) -> None:
    """Raise ConfigError unless all datasets with `class_names` number their classes alike."""
    found = {split: _class_names(data) for split, data in datasets.items()}
    names = {split: list(classes) for split, classes in found.items() if classes is not None}
    first = next(iter(names), "")
    for split in names:
        if names[split] != names[first]:
            odd = sorted(set(names[split]) ^ set(names[first]))
            raise ConfigError(
                f"data.params.{split} has {len(names[split])} classes and {first} {len(names[first])}, which differ "
                f"in {', '.join(odd[:5]) or 'their order'}; "
                f"set data.params.{split}.params.classes to the folder of {first}, or to a list of names"
            )


def _check_training_data(datasets: Mapping[str, Any]) -> None:
    """Raise ConfigError for training on a validation or test split; log images that are also in another split."""
    train = _unwrapped(datasets.get("train"))
    if not isinstance(train, ImageFolder):
        return
    root = train.root.resolve()
    split = train.split or split_of(root.name)
    if split in ("validation", "test") and (train.split or _has_training_sibling(root)):
        advice = "set data.params.train.params.split to train, and root to the folder with the splits"
        raise ConfigError(f"data.params.train: {train.root} holds the {split} split; {advice}")
    trained = {root / item.name for item in train.items}
    for name, other in datasets.items():
        other = _unwrapped(other)
        if name in ("validation", "test") and isinstance(other, ImageFolder):
            folder = other.root.resolve()
            if common := sum(folder / item.name in trained for item in other.items):
                problem = f"{common} of {len(other)} images of {name} are trained on too; set split in both"
                logger.warning("%-11s %s", "data", problem)


def _has_training_sibling(root: Path) -> bool:
    return any(split_of(folder.name) == "train" for folder in root.parent.iterdir() if folder.is_dir())


def _shard_stream(dataset: IterableDataset, rank: int, world_size: int, num_workers: int) -> None:
    if isinstance(dataset, Txt2ImgIterableBaseDataset):
        dataset.set_shard(rank, world_size)
    elif world_size > 1 or num_workers > 1:
        problem = f"unless it splits itself, each of {world_size} ranks and {num_workers} workers gets every sample"
        logger.warning("%s streams but is not a Txt2ImgIterableBaseDataset: %s", type(dataset).__name__, problem)
