"""Snapshots of power-function averages during training (Karras et al. 2024, arXiv 2312.02696, section 3.2).

A snapshot is `ema_snapshots/step=000001000.safetensors` in the run directory. It holds the averages in float16, as
`NAME.SHADOW` (NAME as in `sigma_rel_0_05`), and in its metadata the step, and the width and time of each average.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.checkpoint.formats import CheckpointError, read_metadata, read_tensors
from ldm.checkpoint.write import write_weights

SNAPSHOTS = "ema_snapshots"
_FILE = re.compile(r"step=(\d{9,})\.safetensors")


class Profile(NamedTuple):
    """An average: width sigma_rel, and the number of updates t that it spans."""

    sigma_rel: float
    time: int


class Snapshot(NamedTuple):
    """A stored snapshot; `step` counts optimizer steps."""

    path: Path
    step: int

    def profiles(self) -> dict[str, Profile]:
        """Return the averages in the file by name. Raises CheckpointError for another file."""
        try:
            saved = json.loads(read_metadata(self.path)["averages"])
            return {name: Profile(float(each["sigma_rel"]), int(each["time"])) for name, each in saved.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self.path}: not a snapshot of averages; remove it from the folder") from error

    def tensors(self) -> dict[str, Tensor]:
        return read_tensors(self.path)


def find_snapshots(folder: Path) -> list[Snapshot]:
    """Return the snapshots in a folder, oldest first; none if it does not exist."""
    found = [(path, _FILE.fullmatch(path.name)) for path in folder.glob("step=*.safetensors")]
    return sorted((Snapshot(path, int(match[1])) for path, match in found if match), key=lambda each: each.step)


def snapshot_interval(step: int, every: int, limit: int) -> int:
    """Return the interval of the snapshots that exist at a step: `every`, doubled until they are at most `limit`.

    It depends on the step alone, so a run that was stopped and resumed has the same snapshots.
    """
    while step // every > limit:
        every *= 2
    return every


def write_snapshot(
    folder: Path, step: int, averages: Mapping[str, Mapping[str, Tensor]], profiles: Mapping[str, Profile]
) -> Path:
    """Write averages {NAME: {SHADOW: tensor}} atomically; values beyond float16 are kept in float32."""
    path = folder / f"step={step:09}.safetensors"
    tensors = {f"{name}.{key}": _half(value) for name, shadows in averages.items() for key, value in shadows.items()}
    saved = {name: profile._asdict() for name, profile in profiles.items()}
    write_weights(tensors, path, metadata={"step": str(step), "averages": json.dumps(saved)})
    return path


def _half(value: Tensor) -> Tensor:
    half = value.detach().to("cpu", torch.float16)
    return half if bool(half.isfinite().all()) else value.detach().to("cpu", torch.float32)
