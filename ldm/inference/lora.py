"""LoRA files in sampling: merged into the weights before these are cast and loaded, or left apart as layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.checkpoint import CheckpointError, refuse_adapters
from ldm.checkpoint.diffusers.lora import HEADS, PREFIX, LoraNames, read_lora
from ldm.checkpoint.names import EMA, LORA, ema_name, use_ema_weights
from ldm.modules.adapters.lora import LoRA, LoRASpec, adaptable, apply, networks_of

logger = logging.getLogger(__name__)


class Adapter(NamedTuple):
    """A LoRA file that was read: the adapters by the keys of their layers."""

    path: Path
    layers: dict[str, LoRA]
    strength: float


def read_adapters(files: Sequence[tuple[Path, float]], model: nn.Module, config: Mapping[str, Any]) -> list[Adapter]:
    """Read (file or folder, strength) for a model, which may be on the meta device; config: its own, with key `model`.

    Raises CheckpointError for a file that does not fit the model.
    """
    names = LoraNames(adaptable(networks_of(model)), config)
    paths = [path.resolve() for path, _ in files]
    for path in dict.fromkeys(path for path in paths if paths.count(path) > 1):
        logger.warning("%s: this LoRA is given %d times; the strengths add up", path, paths.count(path))
    adapters = []
    for path, strength in files:
        layers = {key: LoRA(*tensors) for key, tensors in read_lora(path, names).items()}
        adapters.append(Adapter(path, layers, strength))
        logger.info("%s: LoRA of %d layers, strength %g", path, len(layers), strength)
    return adapters


def split_adapter(
    path: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], use_ema: bool
) -> tuple[dict[str, Tensor], list[Adapter]]:
    """Split the weights of a run with the section `adapters` into those of its base and its LoRA (averaged: use_ema).

    Weights without a LoRA are returned as they are. Raises CheckpointError for a LoRA without the section.
    """
    section, names = config["model"]["params"].get("adapters"), [name for name in weights if name.startswith(LORA)]
    if section is None or not names:
        refuse_adapters(path, names)
        return dict(weights), []
    chosen = use_ema_weights(weights)[0] if use_ema else weights  # tokens of the run may have averages too
    spec, layers = LoRASpec(**section), {}
    for name in chosen:
        key, _, last = name.removeprefix(LORA).rpartition(".")
        if name.startswith(LORA) and last == "down":
            tensors = [chosen.get(f"{LORA}{key}.{part}") for part in ("mid", "magnitude")]
            layers[key] = LoRA(chosen[name], chosen[f"{LORA}{key}.up"], float(spec.alpha or spec.rank), *tensors)
    base = {name: tensor for name, tensor in chosen.items() if not name.startswith((LORA, EMA))}
    return base, [Adapter(path, layers, 1.0)]


@torch.no_grad()
def merged(
    weights: Mapping[str, Tensor], adapters: Sequence[Adapter], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """`weights` (published names) with adapters added in float32, in their averages too; CheckpointError if one lacks.

    dtype: of the changed weights; None keeps theirs. Rounding to 16 bits comes last: a change that is smaller than the
    steps of bfloat16 would vanish in weights that are already rounded.
    """
    parts: dict[str, list[tuple[slice, LoRA, float]]] = {}  # name of a weight -> (its rows, adapter, strength)
    for adapter in adapters:
        for key, lora in adapter.layers.items():
            places = _places(key, weights)
            if not places:
                raise CheckpointError(
                    f"{adapter.path}: the checkpoint lacks the weight of {key}, which has a file of its own: "
                    "use --lora_mode live"
                )
            for name, rows in places:
                if weights[name][rows].shape != lora.shape:
                    raise CheckpointError(
                        f"{name}: {tuple(weights[name].shape)} in the checkpoint, but the model's layer has "
                        f"{lora.shape}; does this config match the checkpoint?"
                    )
                parts.setdefault(name, []).append((rows, lora, adapter.strength))
    changed = {}
    for name, changes in parts.items():
        base = weights[name]
        total = base.to(torch.float32, copy=True)
        for rows, lora, strength in changes:
            total[rows] += strength * lora.delta(base[rows])
        changed[name] = total.to(dtype or base.dtype)
        if not torch.isfinite(changed[name]).all() and torch.isfinite(base).all():
            files = ", ".join(str(adapter.path) for adapter in adapters)
            kind = str(changed[name].dtype).removeprefix("torch.")
            raise CheckpointError(f"{files}: {name} would not be finite in {kind}: choose a smaller strength")
    return {**weights, **changed}


def _places(key: str, weights: Mapping[str, Tensor]) -> list[tuple[str, slice]]:
    """(name, rows) of a layer's weight and of its average, as far as `weights` has them."""
    network, _, path = key.partition(".")
    parent, _, last = path.rpartition(".")
    names = _with_average(f"{PREFIX[network]}{path}.weight", weights)
    if names or last not in HEADS:
        return [(name, slice(None)) for name in names]
    names, part = _with_average(f"{PREFIX[network]}{parent}.in_proj_weight", weights), HEADS.index(last)
    width = [weights[name].shape[0] // len(HEADS) for name in names]
    return [(name, slice(part * rows, (part + 1) * rows)) for name, rows in zip(names, width)]


def _with_average(name: str, weights: Mapping[str, Tensor]) -> list[str]:
    return [found for found in (name, ema_name(name, weights.__contains__)) if found is not None and found in weights]


def add_live(model: nn.Module, adapters: Sequence[Adapter]) -> None:
    """Leave the weights as they are and add the adapters to the layers' outputs, at a cost in every step."""
    for adapter in adapters:
        apply(networks_of(model), adapter.layers, adapter.strength)
