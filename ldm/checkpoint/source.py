"""Weights at a path: a file, an index of shards or a diffusers folder; only `open_weights` asks which."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import Tensor

from ldm.checkpoint.diffusers.plan import plan_of
from ldm.checkpoint.diffusers.read import check_folder, check_is_model, read_folder
from ldm.checkpoint.formats import (
    CheckpointError,
    existing_file,
    global_step,
    part_files,
    read_entry,
    read_index,
    read_metadata,
    read_shards,
    read_tensors,
)
from ldm.checkpoint.names import published_names, use_ema_weights
from ldm.paths import files_in, fingerprint


@dataclass(frozen=True)
class WeightsSource:
    """Weights of a model that are not yet read; `path` is a file or a folder."""

    path: Path

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under its published name, on the CPU, memory-mapped where the format allows."""
        raise NotImplementedError

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise CheckpointError if a description next to the weights differs from `config` (with its key `model`)."""

    def step(self) -> int | None:
        """The optimizer step at which Lightning wrote the weights; None if it is not recorded."""
        return None

    @property
    def averaged(self) -> bool:
        """True if the weights have no averages beside them, and none are expected: they are averages, or alone."""
        return False

    @property
    def files(self) -> Sequence[Path]:
        """Every file that determines the model: weights and their configs."""
        return [self.path]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the content, see `ldm.paths.fingerprint`."""
        return fingerprint(self.path, self.files)


class BaseWeights(NamedTuple):
    """The weights that adapters were trained on, as their checkpoint records them under `base`."""

    path: str
    fingerprint: str

    @classmethod
    def of(cls, path: str | os.PathLike) -> Self:
        source = open_weights(path)
        return cls(str(source.path.absolute()), source.fingerprint)

    def open(self, checkpoint: Path) -> WeightsSource:
        """Open the base of a checkpoint: at its path, else next to the checkpoint. Raises CheckpointError."""
        places = (Path(self.path), checkpoint.with_name(Path(self.path).name))
        place = next((place for place in places if place.exists() and place != checkpoint), None)
        if place is None:
            raise CheckpointError(
                f"{checkpoint}: holds adapters only; their base weights {self.path} are missing: put them there, or in "
                f"{checkpoint.parent}"
            )
        source = open_weights(place)
        self.check(source.fingerprint, f"{checkpoint}: {place}")
        return source

    def check(self, fingerprint: str, where: str) -> None:
        """Raise CheckpointError unless the base that is used has the recorded fingerprint."""
        if fingerprint != self.fingerprint:
            raise CheckpointError(
                f"{where}: the adapters were trained on other base weights, {self.path} (fingerprint "
                f"{self.fingerprint}, now {fingerprint}): restore that file"
            )


class WeightsFile(WeightsSource):
    """A .ckpt or .safetensors file (told apart by content): a bare state dict, or a checkpoint with a `state_dict`."""

    def tensors(self) -> dict[str, Tensor]:
        """As the base class; a checkpoint of adapters is completed by its base, with the EMA weights of that."""
        own = published_names(read_tensors(self.path))
        base = base_of(self.path)
        if base is None:
            return own
        weights, _ = use_ema_weights(base.open(self.path).tensors())
        return {**weights, **own}

    def step(self) -> int | None:
        recorded = read_metadata(self.path).get("step", "")
        return int(recorded) if recorded.isdecimal() else global_step(self.path)

    @property
    def averaged(self) -> bool:
        return "average" in read_metadata(self.path)

    @property
    def files(self) -> Sequence[Path]:
        return [self.path, *part_files(self.path)]


class ShardedWeights(WeightsSource):
    """An index of shards (`*.index.json`)."""

    def tensors(self) -> dict[str, Tensor]:
        return published_names(read_shards(self.path))

    @property
    def files(self) -> Sequence[Path]:
        return [self.path, *(self.path.with_name(name) for name in sorted(set(read_index(self.path).values())))]


class DiffusersFolder(WeightsSource):
    """A folder in diffusers' layout: a pipeline, a UNet or a first stage. It holds one set of weights."""

    @property
    def averaged(self) -> bool:
        return True

    def tensors(self) -> dict[str, Tensor]:
        return published_names(read_folder(self.path))

    def check(self, config: Mapping[str, Any]) -> None:
        check_folder(self.path, plan_of(config))

    @property
    def files(self) -> Sequence[Path]:
        return files_in(self.path)


def open_weights(path: str | os.PathLike | WeightsSource) -> WeightsSource:
    """The weights at a path; a source is returned as it is. CheckpointError (MissingWeightsError for no such path)."""
    if isinstance(path, WeightsSource):
        return path
    path = Path(path)
    if path.is_dir():
        check_is_model(path)
        return DiffusersFolder(path)
    return (
        ShardedWeights(existing_file(path)) if path.name.endswith(".index.json") else WeightsFile(existing_file(path))
    )


def base_of(path: str | os.PathLike) -> BaseWeights | None:
    """The base of a checkpoint of adapters; None for other weights."""
    record = read_entry(Path(path), "base") if Path(path).is_file() else None
    if record is None:
        return None
    if not (isinstance(record, Mapping) and all(isinstance(record.get(key), str) for key in BaseWeights._fields)):
        raise CheckpointError(f"{path}: invalid record of the base weights: {record!r:.80}")
    return BaseWeights(record["path"], record["fingerprint"])
