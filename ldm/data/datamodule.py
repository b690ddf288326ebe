"""Datasets from a config, with loaders whose order depends on (seed, epoch) alone and which resume in mid-epoch."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ldm.config.instantiate import ConfigError, get_obj_from_str, instantiate_from_config
from ldm.data.base import DataConfigError, Txt2ImgIterableBaseDataset
from ldm.data.order import EpochSampler, Position, SeededDataset, StreamLoader, usable_cpus

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test", "predict")


class Origin(NamedTuple):
    """Where this fit began: a position in the data, and how many batches the run had been trained on by then."""

    position: Position
    trained: int


class WrappedDataset(Dataset):
    """Anything with `__len__` and `__getitem__` as a PyTorch dataset."""

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
    num_workers: data worker processes per loader and rank; None is the published 2 * batch_size, at most the rank's share of the CPUs.
    shuffle_test_loader, shuffle_val_dataloader: shuffle these too (training data is always shuffled, unless it streams).
    use_worker_init_fn: published; what it asks for (workers seeded, streams split among them) is always done: both values do the same.

    `seed` is set before `fit`. The order of the samples, and the random numbers that a sample is drawn with, are functions of (seed, epoch,
    index); validation, test and predict draw the same in every epoch. Lightning's checkpoints hold the position, counted in batches trained
    on, and a run resumed from one sees the batches that it would have seen without the interruption.
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
        self.dataset_configs = {
            split: c for split, c in zip(SPLITS, (train, validation, test, predict)) if c is not None
        }
        self.datasets: dict[str, Any] = {}
        self._default_workers = num_workers is None
        self._shuffle = {
            "train": True,
            "validation": shuffle_val_dataloader,
            "test": shuffle_test_loader,
            "predict": False,
        }
        self._origin = Origin(Position(0, 0), 0)
        # Lightning takes a hook for defined where it is another function than the base's: only splits with a config have a loader.
        for split in self.dataset_configs:
            hook = "val_dataloader" if split == "validation" else f"{split}_dataloader"
            setattr(self, hook, getattr(self, f"_{hook}"))

    def prepare_data(self) -> None:
        """What must be done once before the datasets are built: those that have a `prepare_data` of their own unpack, or fetch on request.

        Lightning calls it in one process of each machine, and main before it; what is done already is left alone.
        """
        for split, config in self.dataset_configs.items():
            if split not in self.datasets and (prepare := _preparation(config)) is not None:
                with _placed(split):
                    prepare(**(config.get("params") or {}))

    def setup(self, stage: str | None = None) -> None:
        """Build every dataset that is not built yet; Lightning and main both call it."""
        self._origin = Origin(Position(0, 0), 0)  # a new fit begins at the start, unless load_state_dict says otherwise
        for split, config in self.dataset_configs.items():
            if split not in self.datasets:
                dataset = self._build(split, config)
                self.datasets[split] = WrappedDataset(dataset) if self.wrap else dataset
        _check_classes(self.datasets)

    def state_dict(self) -> dict[str, int]:
        """The position, counted in batches trained on."""
        if self.trainer is None or self.trainer.state.fn != "fit":
            return {}
        epoch, batch = self._position()
        batch_size = self.batch_size * self._ranks()[1]
        return {
            "seed": self.seed,
            "epoch": epoch,
            "batch": batch,
            "trained": self._trained(),
            "global_batch_size": batch_size,
        }

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on at a saved position, with its seed."""
        if not state_dict:
            return
        saved, now = state_dict["global_batch_size"], self.batch_size * self._ranks()[1]
        batch = state_dict["batch"] * saved // now
        if saved != now:
            logger.warning(
                "%-11s %d samples a step, %d before: this epoch goes on after the samples that were used",
                "data",
                now,
                saved,
            )
        if state_dict["seed"] != self.seed:
            logger.warning(
                "%-11s the order goes on with the checkpoint's seed, %d, not with %d",
                "data",
                state_dict["seed"],
                self.seed,
            )
            self.seed = state_dict["seed"]
        self._origin = Origin(Position(state_dict["epoch"], batch), state_dict["trained"])
        logger.info("%-11s going on in epoch %d after %d batches", "data", *self._origin.position)
        # Lightning asks the loader itself whether it can resume; here the data module does that.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")

    def _train_dataloader(self) -> DataLoader:
        return self._loader("train")

    def _val_dataloader(self) -> DataLoader:
        return self._loader("validation")

    def _test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def _predict_dataloader(self) -> DataLoader:
        return self._loader("predict")

    def _build(self, split: str, config: Any) -> Any:
        with _placed(split):
            return instantiate_from_config(config)

    def _loader(self, split: str) -> DataLoader:
        if split not in self.datasets:
            self.setup()
        dataset = self.datasets[split]
        rank, world_size = self._ranks()
        position = self._position if split == "train" else None
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "num_workers": self._workers(),
            "pin_memory": self._pin_memory(),
        }
        if isinstance(dataset, IterableDataset):
            _shard_stream(dataset, rank, world_size, options["num_workers"])
            stream = StreamLoader(dataset, **options)
            stream.seed, stream.position = self.seed, position
            return stream
        if not len(dataset):
            raise ConfigError(f"data.params.{split}: {type(dataset).__name__} is empty")
        sampler = EpochSampler(
            len(dataset), self.batch_size, self.seed, self._shuffle[split], rank, world_size, position
        )
        # A generator of its own: a loader that takes its workers' seeds from the global one would disturb the training.
        options["generator"] = torch.Generator().manual_seed(self.seed)
        return DataLoader(SeededDataset(dataset, self.seed, repeat=split != "train"), sampler=sampler, **options)

    def _position(self) -> Position | None:
        """Where the next batch of training data is; None without a trainer.

        Counted in batches trained on, not in Lightning's epochs: it begins its first pass before it says which epoch that is, closes an
        epoch that max_steps cut short, and counts a checkpoint at an epoch's end in several ways.
        """
        if self.trainer is None:
            return None
        loop = self.trainer.fit_loop
        (epoch, batch), since = self._origin.position, self._trained() - self._origin.trained
        if since == 0:
            return self._origin.position
        if math.isfinite(loop.max_batches):
            passes, batch = divmod(batch + since, int(loop.max_batches))
            return Position(epoch + passes, batch)
        epochs = loop.epoch_progress.current  # a stream of unknown length: only Lightning knows when it ended
        return Position(
            epochs.processed, loop.epoch_loop.batch_progress.current.processed if epochs.ready > epochs.processed else 0
        )

    def _trained(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _workers(self) -> int:
        if self._default_workers and self.trainer is not None:
            return max(1, min(self.num_workers, usable_cpus() // self.trainer.num_devices))
        return self.num_workers

    def _pin_memory(self) -> bool:
        from pytorch_lightning.accelerators import CUDAAccelerator

        return self.trainer is not None and isinstance(self.trainer.accelerator, CUDAAccelerator)


def _preparation(config: Any) -> Callable[..., None] | None:
    """A dataset's own `prepare_data`; None without one, and for a config that cannot be built, which `setup` says more about."""
    try:
        return getattr(get_obj_from_str(config["target"]), "prepare_data", None)
    except (ConfigError, KeyError, TypeError):
        return None


@contextmanager
def _placed(split: str) -> Iterator[None]:
    """A dataset's errors with their place in the YAML."""
    try:
        yield
    except DataConfigError as error:
        raise error.at(f"data.params.{split}") from error


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"data.params.{name} {value!r}: expected an integer of at least {least}")


def _check_classes(datasets: Mapping[str, Any]) -> None:
    """The splits must number their classes alike; a dataset says how in `class_names`."""
    names = {
        split: list(c)
        for split, d in datasets.items()
        if (c := getattr(getattr(d, "data", d), "class_names", None)) is not None
    }
    first = next(iter(names), None)
    for split in names:
        if names[split] != names[first]:
            odd = sorted(set(names[split]) ^ set(names[first]))
            raise ConfigError(
                f"data.params.{split}: its {len(names[split])} classes are not the {len(names[first])} of {first} "
                f"(differing: {', '.join(odd[:5]) or 'their order'}); "
                f"set data.params.{split}.params.classes to the folder of {first}, or to a list of names"
            )


def _shard_stream(dataset: IterableDataset, rank: int, world_size: int, num_workers: int) -> None:
    if isinstance(dataset, Txt2ImgIterableBaseDataset):
        dataset.set_shard(rank, world_size)
    elif world_size > 1 or num_workers > 1:
        logger.warning(
            "%s streams and is no Txt2ImgIterableBaseDataset: unless it splits itself, each of %d ranks and %d workers gets every sample",
            type(dataset).__name__,
            world_size,
            num_workers,
        )
