"""Datasets from a config, with loaders whose order depends on (seed, epoch) alone and that resume within an epoch."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.loops.progress import _ProcessedTracker
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ldm.cli import counted
from ldm.config.instantiate import ConfigError, instantiate_from_config
from ldm.config.types import NonNegativeInt, PositiveInt
from ldm.data.base import DataConfigError, Txt2ImgIterableBaseDataset, leaves, prepare
from ldm.data.folder import ImageFolder
from ldm.data.order import EpochSampler, Position, SeededDataset, Slice, StreamLoader, usable_cpus
from ldm.data.shards import identity
from ldm.data.splits import split_of
from ldm.data.webdataset import ImageShards
from ldm.data.workers import Loader, Traced
from ldm.rng import BatchSamples

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test", "predict")
_CLASSES_SHOWN = 20  # in the log
_CONTENT = ("labels", "content")  # entries of fingerprints that have no effect on the order of the samples
EVALUATION = -1  # in place of the epoch of training


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
    samples trained on by all ranks, so a resumed run gets the same samples as an uninterrupted one, also with another
    batch size, number of devices or of workers.

    Checkpoints also hold the class names and a fingerprint of each dataset. At resume, a change of the data is logged,
    and refused if `strict` is set; class numbers that changed are always refused.
    """

    def __init__(
        self,
        batch_size: PositiveInt,
        train: Any = None,
        validation: Any = None,
        test: Any = None,
        predict: Any = None,
        wrap: bool = False,
        num_workers: NonNegativeInt | None = None,
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
    ) -> None:
        super().__init__()
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
        self._resized = False  # True if another global batch size was used before
        self._loaders: dict[str, EpochSampler | StreamLoader] = {}  # what knows the samples of each batch
        # Lightning uses a hook if it is overridden: only splits with a config override theirs.
        for split in self.dataset_configs:
            hook = "val_dataloader" if split == "validation" else f"{split}_dataloader"
            setattr(self, hook, partial(self._loader, split))

    def prepare_data(self) -> None:
        """Call `prepare_data` (unpack, download) of the datasets that have it, before they are built.

        main and Lightning both call it, in one process per machine; datasets skip what is done already.
        """
        for split, config in self.dataset_configs.items():
            if split not in self.datasets:
                with _located(split):
                    prepare(config)

    def setup(self, stage: str | None = None) -> None:
        """Build the datasets that are not built yet; main and Lightning both call it."""
        # Unless load_state_dict sets others.
        self._start, self._trained_before, self._resized = Position(0, 0), 0, False
        new = {split: config for split, config in self.dataset_configs.items() if split not in self.datasets}
        for split, config in new.items():
            with _located(split):
                dataset = instantiate_from_config(config)
            self.datasets[split] = WrappedDataset(dataset) if self.wrap else dataset
        if new:
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
        """Return the seed, the position counted in samples trained on, and the data; empty outside of `fit`."""
        trainer = self.trainer
        if trainer is None or trainer.state.fn != "fit" or (position := self._position()) is None:
            return {}
        return {
            "seed": self.seed,
            "epoch": position.epoch,
            "samples": position.samples,
            "trained": _processed(trainer.fit_loop.epoch_loop.batch_progress.total),
            "global_batch_size": self._global_batch_size(),
            "class_names": self.class_names,
            "datasets": {split: _fingerprint(dataset) for split, dataset in self.datasets.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved position with its seed; raise ConfigError for a change of data that is not allowed."""
        if not state_dict:
            return
        _check_class_numbers(state_dict.get("class_names", []), self.class_names)
        self._compare_data(state_dict.get("datasets", {}))
        saved_size, size, seed = state_dict["global_batch_size"], self._global_batch_size(), state_dict["seed"]
        if saved_size != size and getattr(unwrapped(self.datasets.get("train")), "buckets", None) is not None:
            raise ConfigError(
                f"data: batches of {size} samples of all devices, previously {saved_size}: with buckets a run resumes "
                "with the same data.params.batch_size x devices; accumulate_grad_batches changes the effective batch"
            )
        if saved_size != size:
            problem = f"batch size {size}, previously {saved_size}: the epoch continues after the used samples"
            logger.warning("%-11s %s", "data", problem)
        if seed != self.seed:
            logger.warning("%-11s the order keeps the checkpoint's seed %d, not %d", "data", seed, self.seed)
            self.seed = seed
        # Older checkpoints count batches.
        samples = state_dict["samples"] if "samples" in state_dict else state_dict["batch"] * saved_size
        self._start = Position(state_dict["epoch"], samples)
        self._resized = saved_size != size
        self._trained_before = state_dict["trained"]
        logger.info("%-11s continuing in epoch %d after %d samples", "data", *self._start)
        # Lightning expects the loader to support resuming; here the data module does.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")

    def _compare_data(self, saved: Mapping[str, Mapping[str, int | str]]) -> None:
        """Log datasets that differ from their saved fingerprints; raise ConfigError if `strict`."""
        for split in saved.keys() & self.datasets.keys():
            before, now = saved[split], _fingerprint(self.datasets[split])
            if changed := [key for key in before if before[key] != now.get(key)]:
                change = f"other {', '.join(changed)} than when the checkpoint was saved"
                problem = f"data.params.{split}: {change} ({now['samples']} samples, previously {before['samples']})"
                if self.strict:
                    raise ConfigError(f"{problem}; restore them, or resume without --strict-data")
                if split == "train" and any(key.split()[-1] not in _CONTENT for key in changed):
                    problem += "; the rest of this epoch may repeat or miss samples"
                logger.warning("%-11s %s", "data", problem)

    def _loader(self, split: str) -> DataLoader:
        if split not in self.datasets:
            self.setup()
        loader = self._build_loader(split)
        if split == "train":
            self._count_in_batches_of_this_size()
        return loader

    def _build_loader(self, split: str) -> DataLoader:
        dataset = self.datasets[split]
        rank, world_size = self._ranks()
        position = self._position if split == "train" else None
        workers = self._workers()
        on_cuda = self.trainer is not None and isinstance(self.trainer.accelerator, CUDAAccelerator)
        options: dict[str, Any] = {"batch_size": self.batch_size, "num_workers": workers, "pin_memory": on_cuda}
        if isinstance(dataset, IterableDataset):
            _shard_stream(dataset, rank, world_size, workers)
            stream = StreamLoader(
                dataset, seed=self.seed, rank=rank, world_size=world_size, position=position, **options
            )
            self._loaders[split] = stream
            return stream
        if not len(dataset):
            raise ConfigError(f"data.params.{split}: {type(dataset).__name__} is empty")
        shuffle = self._shuffle.get(split, False)
        with _located(split):  # buckets may not fit the batch
            sampler = EpochSampler(unwrapped(dataset), self.batch_size, self.seed, shuffle, rank, world_size, position)
        if text := getattr(unwrapped(dataset), "bucket_text", ""):
            logger.info("%-11s %s: %s", "buckets", split, text)
        self._loaders[split] = sampler
        # Its own generator seeds the workers: the global one belongs to the training.
        options["generator"] = torch.Generator().manual_seed(self.seed)
        seeded: Dataset = SeededDataset(unwrapped(dataset), self.seed, repeat=split != "train")
        return Loader(Traced(seeded, workers) if workers else seeded, sampler=sampler, **options)

    # ------------------------------------------------------------------------------------------- position and samples

    def _position(self) -> Position | None:
        """Return the position of the next training batch; None without a trainer.

        Counted in batches trained on, not in Lightning's epochs: Lightning starts its first pass before it sets the
        epoch, closes an epoch that max_steps cut short, and counts a checkpoint at the end of an epoch in several ways.
        """
        if self.trainer is None:
            return None
        loop, start, size = self.trainer.fit_loop, self._start, self._global_batch_size()
        since = _processed(loop.epoch_loop.batch_progress.total) - self._trained_before
        if since == 0:
            return start
        if math.isfinite(loop.max_batches):
            per_pass = int(loop.max_batches)
            left = per_pass - self._first_batch(per_pass)  # batches of the first pass
            if since < left:
                return Position(start.epoch, start.samples + since * size)
            passes, batches = divmod(since - left, per_pass)
            return Position(start.epoch + 1 + passes, batches * size)
        epochs = loop.epoch_progress.current  # a stream of unknown length: only Lightning knows when it ended
        epoch = _processed(epochs)
        if epochs.ready > epoch == start.epoch:
            return Position(epoch, start.samples + since * size)
        batches = _processed(loop.epoch_loop.batch_progress.current) if epochs.ready > epoch else 0
        return Position(epoch, batches * size)

    def _samples_in(self, batches: int) -> int:
        """Number of samples of all ranks in a pass of this many batches."""
        length = getattr(self._loaders.get("train"), "length", None)  # a subclass may have a loader of its own
        most = batches * self._global_batch_size()
        return most if length is None else min(length, most)

    def _first_batch(self, per_pass: int) -> int:
        """Return the number of the first batch of this fit in its epoch, in batches of this size."""
        left = self._samples_in(per_pass) - self._start.samples
        return per_pass - max(0, math.ceil(left / self._global_batch_size()))

    def _count_in_batches_of_this_size(self) -> None:
        """Correct Lightning's count of the batches of an epoch that was begun, perhaps with another batch size."""
        if self.trainer is None or not self._start.samples:
            return
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress  # Lightning annotates only some of the counters
        progress.is_last_batch = False  # true if the state was saved before the last batch was trained on
        loader, limit = self._loaders["train"], self.trainer.limit_train_batches
        if not self._resized or loader.length is None:
            return
        batches = math.ceil(loader.length / self._global_batch_size())
        per_pass = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
        first = self._first_batch(per_pass)
        if first == per_pass:
            self._start = Position(self._start.epoch + 1, 0)
        behind = progress.total.processed - progress.total.completed  # 1 if saved before the end of a batch's hooks
        current = progress.current
        current.ready = current.started = current.processed = first
        current.completed = first - behind
        self._resized = False

    def training_samples(self, ahead: int = 0) -> BatchSamples | None:
        """Return this rank's samples of the next training batch, or of the one `ahead` batches later in its epoch.

        None if they are unknown: without a trainer, or after the end of the epoch.
        """
        position, loader = self._position(), self._loaders.get("train")
        if position is None or loader is None:
            return None
        trainer, size, ranks = self.trainer, self._global_batch_size(), self._ranks()[1]
        position = position._replace(samples=position.samples + ahead * size)
        part = loader.slice_at(position)
        if part.total == 0:
            return None
        samples = self._batch_samples(position.epoch, position, part)
        per_pass = trainer.fit_loop.max_batches if trainer is not None else math.inf
        if trainer is None or not math.isfinite(per_pass):
            return samples
        accumulated = getattr(trainer.lightning_module, "accumulate_grad_batches", None)  # by manual optimization
        accumulated = accumulated or trainer.accumulate_grad_batches
        end = self._samples_in(int(per_pass))
        samples.weight = part.size * ranks / part.total
        if position.samples >= end:  # behind limit_train_batches: measured, not trained on
            return samples
        batch = int(per_pass) - math.ceil((end - position.samples) / size)
        # An optimizer step takes the batches `first` to `last` - 1.
        first, last = batch - batch % accumulated, batch - batch % accumulated + accumulated
        if position.epoch == self._start.epoch:
            first = max(first, self._first_batch(int(per_pass)))
        step = min(position.samples + (last - batch) * size, end) - (position.samples - (batch - first) * size)
        samples.gradient_scale = part.size * ranks * accumulated / step
        return samples

    def evaluation_samples(self, split: str, batch: int) -> BatchSamples | None:
        """Return this rank's samples of a batch of validation or test, whose random numbers are always the same."""
        loader = self._loaders.get(split)
        if loader is None:
            return None
        epoch = loader.epoch if isinstance(loader, EpochSampler) else 0
        position = Position(epoch, batch * self._global_batch_size())
        part = loader.slice_at(position)
        if not part.indices:
            return None
        samples = self._batch_samples(EVALUATION, position, part)
        samples.weight = float(part.size > 0)
        return samples

    def _batch_samples(self, epoch: int, position: Position, part: Slice) -> BatchSamples:
        rank, ranks = self._ranks()
        places = range(rank, part.total, ranks) if part.size else (0,)
        return BatchSamples(self.seed, epoch, part.indices, part.total, start=position.samples, places=places)

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


@contextmanager
def _located(split: str) -> Iterator[None]:
    """Add the YAML path of a dataset to its errors."""
    try:
        yield
    except DataConfigError as error:
        raise error.at(f"data.params.{split}") from error


def unwrapped(dataset: Any) -> Any:
    """Return a dataset without its WrappedDataset, if it has one."""
    return dataset.data if isinstance(dataset, WrappedDataset) else dataset


def _class_names(dataset: Any) -> Sequence[str] | None:
    return getattr(unwrapped(dataset), "class_names", None)


def _fingerprint(dataset: Any) -> dict[str, int | str]:
    """Return the number of `samples` of a dataset, and what its own `fingerprint` tells apart."""
    dataset = unwrapped(dataset)
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
    parts = {name: list(leaves(unwrapped(dataset), f"data.params.{name}")) for name, dataset in datasets.items()}
    for place, part in parts.get("train", ()):
        if isinstance(part, ImageFolder):
            root = part.root.resolve()
            split = part.split or split_of(root.name)
            if split in ("validation", "test") and (part.split or _has_training_sibling(root)):
                advice = f"set {place}.params.split to train, and root to the folder with the splits"
                raise ConfigError(f"{place}: {part.root} holds the {split} split; {advice}")
    trained_shards, trained_images = _files(parts.get("train", ()))
    for name in ("validation", "test"):
        shards, images = _files(parts.get(name, ()))
        if common := shards & trained_shards:
            shared = f"{counted(len(common), 'shard')} of {name}, e.g. {min(common)}"
            logger.warning("%-11s trained on too: %s", "data", shared)
        if count := len(images & trained_images):
            problem = f"{count} of {len(images)} images of {name} are trained on too; set split in both"
            logger.warning("%-11s %s", "data", problem)


def _files(parts: Iterable[tuple[str, Any]]) -> tuple[set[str], set[str]]:
    """Return the shards and the images in folders that datasets read, with absolute paths."""
    datasets = [part for _, part in parts]
    shards = {identity(shard) for part in datasets if isinstance(part, ImageShards) for shard in part.shards}
    folders = [(part.root.resolve(), part.items) for part in datasets if isinstance(part, ImageFolder)]
    return shards, {f"{root}/{item.name}" for root, items in folders for item in items}


def _has_training_sibling(root: Path) -> bool:
    return any(split_of(folder.name) == "train" for folder in root.parent.iterdir() if folder.is_dir())


def _shard_stream(dataset: IterableDataset, rank: int, world_size: int, num_workers: int) -> None:
    if isinstance(dataset, Txt2ImgIterableBaseDataset):
        dataset.set_shard(rank, world_size)
    elif world_size > 1 or num_workers > 1:
        problem = f"unless it splits itself, each of {world_size} ranks and {num_workers} workers gets every sample"
        logger.warning("%s streams but is not a Txt2ImgIterableBaseDataset: %s", type(dataset).__name__, problem)
