"""Averages of any width from stored snapshots (Karras et al. 2024, arXiv 2312.02696, section 3.2 and appendix C)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ldm.checkpoint import open_weights, write_weights
from ldm.checkpoint.formats import CheckpointError, read_metadata
from ldm.checkpoint.names import EMA, use_ema_weights
from ldm.checkpoint.snapshots import Profile, Snapshot, find_snapshots
from ldm.checkpoint.source import base_of
from ldm.modules.ema import power_gamma

logger = logging.getLogger(__name__)

FAR = 0.1  # a relative error of the profile beyond which the average has not the width that was asked for


class Reconstructed(NamedTuple):
    """A file of an average. error: relative L2 distance of its profile over training from the one asked for."""

    sigma_rel: float
    path: Path
    error: float
    kept: bool  # it existed, of the same run, step and width


class _Source(NamedTuple):
    """An average in a snapshot, or in the run's checkpoint (no snapshot)."""

    profile: Profile
    snapshot: Snapshot | None
    prefix: str  # of its tensors


def reconstruct(
    folder: Path, ckpt: Path, targets: Mapping[float, Path], until: int | None = None, every: int = 1
) -> list[Reconstructed]:
    """Write weights averaged with each width: {sigma_rel: file}; a file of the same run, step and width is kept.

    folder: of the snapshots. ckpt: the run's checkpoint, which gives all other weights, and its own averages if they
    are newer than the snapshots. until: the average ends at the last snapshot up to this optimizer step. every: of the
    section ema_config.
    Raises CheckpointError without snapshots, ValueError for a width out of range and for a file of anything else.
    """
    for sigma_rel in targets:
        power_gamma(sigma_rel)  # raises before anything is read
    if base_of(ckpt) is not None:
        raise CheckpointError(f"{ckpt}: holds adapters alone, whose averages cannot be combined afterwards")
    weights = open_weights(ckpt).tensors()
    snapshots = [each for each in find_snapshots(folder) if until is None or each.step <= until]
    sources = [
        _Source(profile, each, f"{name}.") for each in snapshots for name, profile in sorted(each.profiles().items())
    ]
    if not sources:
        raise CheckpointError(
            f"{folder}: no snapshots{'' if until is None else f' up to step {until}'}: train with "
            "model.params.ema_config.snapshot_every and power-function averages (docs/ema.md)"
        )
    end = max(source.profile.time for source in sources)
    if until is None:
        own = [each for each in _in_checkpoint(weights, every) if each.profile.time > end]
        end = max([end, *(each.profile.time for each in own)])
        sources += own
    wanted = [Profile(sigma_rel, end) for sigma_rel in targets]
    factors, errors = combinations([source.profile for source in sources], wanted)
    step, run = max((each.step for each in snapshots), default=0), folder.resolve().parent.name
    metadata = [
        {"average": f"sigma_rel {each.sigma_rel:g}", "step": str(step), "end": str(end), "run": run} for each in wanted
    ]
    kept = [_exists(path, own) for path, own in zip(targets.values(), metadata)]
    missing = [number for number, each in enumerate(kept) if not each]
    sums: list[dict[str, Tensor]] = [{} for _ in targets]
    cached: tuple[Snapshot | None, dict[str, Tensor]] = (None, weights)
    for source, row in zip(sources if missing else (), factors):
        if source.snapshot is not cached[0]:
            cached = (source.snapshot, weights if source.snapshot is None else source.snapshot.tensors())
        for name, value in _shadows(cached[1], source.prefix).items():
            for number in missing:
                total, factor = sums[number], row[number]
                total[name] = total[name].add(value.float(), alpha=factor) if name in total else value.float() * factor
    paths = list(targets.values())
    for number in missing:
        _write(weights, sums[number], paths[number], metadata[number], float(errors[number]))
    return [Reconstructed(*each) for each in zip(targets, paths, map(float, errors), kept)]


def _exists(path: Path, metadata: Mapping[str, str]) -> bool:
    """True if `path` is the file that would be written, False if there is none; ValueError for another one."""
    if not path.exists():
        return False
    if read_metadata(path) != metadata:
        raise ValueError(f"{path}: exists, of another run, step or width; choose another --out or remove it first")
    return True


def combinations(profiles: Sequence[Profile], targets: Sequence[Profile]) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors (profiles, targets) whose sums of profiles are nearest to the targets, and their errors.

    An error is the L2 distance from its target, relative to the target's norm: (targets,).
    """
    A, B = inner_products(profiles, profiles), inner_products(profiles, targets)
    X = np.linalg.lstsq(A, B, rcond=None)[0]
    norms = np.diag(inner_products(targets, targets))
    squares = norms - 2.0 * (X * B).sum(axis=0) + (X * (A @ X)).sum(axis=0)
    return X, np.sqrt(squares.clip(min=0.0) / norms)


def inner_products(a: Sequence[Profile], b: Sequence[Profile]) -> np.ndarray:
    """Return the integrals of p_a p_b over time, (a, b), where p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on [0, T].

    With m = min(T_a, T_b): (g_a + 1) (g_b + 1) / (g_a + g_b + 1) m^(g_a + g_b + 1) / (T_a^(g_a + 1) T_b^(g_b + 1)).
    """
    ga, gb = (np.array([power_gamma(each.sigma_rel) for each in profiles]) for profiles in (a, b))
    ta, tb = (np.array([float(each.time) for each in profiles]) for profiles in (a, b))
    ga, ta = ga[:, None], ta[:, None]
    m = np.minimum(ta, tb)
    powers = (ga + 1) * np.log(m / ta) + (gb + 1) * np.log(m / tb)
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * np.exp(powers) / m


def _in_checkpoint(weights: Mapping[str, Tensor], every: int) -> list[_Source]:
    """Return the power-function averages of a checkpoint."""
    widths = {
        name: float(value) for name, value in weights.items() if name.startswith(EMA) and name.endswith("sigma_rel")
    }
    found = []
    for name, width in widths.items():
        prefix = name.removesuffix("sigma_rel")
        calls = int(weights[f"{prefix}num_updates"])
        found.append(_Source(Profile(round(width, 6), calls // every * every), None, prefix))
    return found


def _shadows(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the averaged parameters of an average, without counters and further averages."""
    named = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    counters = ("decay", "num_updates", "sigma_rel")
    return {name: value for name, value in named.items() if "." not in name and name not in counters}


def _write(
    weights: Mapping[str, Tensor], average: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], error: float
) -> None:
    kept = {name: value for name, value in weights.items() if not name.startswith(EMA)}
    if error > FAR:
        text = "%s: the nearest profile has a relative error of %.2g; more or later snapshots are needed"
        logger.warning(text, metadata["average"], error)
    chosen, taken = use_ema_weights({**kept, **{f"{EMA}{name}": value for name, value in average.items()}})
    if taken != len(average):
        raise CheckpointError(f"{len(average) - taken} averaged parameters of the snapshots are not in the checkpoint")
    write_weights(
        {name: value.to(weights[name].dtype) if name in weights else value for name, value in chosen.items()},
        path,
        metadata,
    )
