"""Relation of a published tensor to the tensors that diffusers has in its place: equal, reshaped, or split."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.checkpoint.formats import CheckpointError, preview


class ConversionError(CheckpointError):
    """A model, file or folder that cannot be converted; the message is one line."""


class Form(NamedTuple):
    """Two inverse maps between the published tensor and diffusers' tensors."""

    split: Callable[[Tensor], list[Tensor]]
    join: Callable[[list[Tensor]], Tensor]


SAME = Form(lambda tensor: [tensor], lambda parts: parts[0])
"""One tensor, equal on both sides."""

CONV2D = Form(lambda tensor: [tensor.flatten(1)], lambda parts: parts[0].flatten(1)[:, :, None, None])
"""A published 1x1 convolution (O, I, 1, 1), in diffusers a linear layer (O, I); old folders have the convolution."""

CONV1D = Form(lambda tensor: [tensor.flatten(1)], lambda parts: parts[0].flatten(1)[:, :, None])
"""A published convolution over sequences (O, I, 1), in diffusers a linear layer (O, I)."""

STACKED = Form(lambda tensor: list(tensor.chunk(3)), torch.cat)
"""Published queries, keys and values stacked in one tensor, in diffusers three tensors."""


def by_head(heads: int, kernel: int) -> Form:
    """Published queries, keys and values stacked per head, (H * 3 * D, ...), in diffusers three tensors.

    kernel: trailing axes of length 1 of the published weight, which linear layers lack; 0 for a bias.
    """

    def split(tensor: Tensor) -> list[Tensor]:
        grouped = tensor.unflatten(0, (heads, 3, -1))  # (H, 3, D, ...)
        parts = (grouped[:, k].flatten(0, 1) for k in range(3))  # (H * D, ...)
        return [part.flatten(1) if kernel else part for part in parts]

    def join(parts: list[Tensor]) -> Tensor:
        joined = torch.cat([part.unflatten(0, (heads, 1, -1)) for part in parts], 1).flatten(0, 2)
        return joined.flatten(1)[(..., *[None] * kernel)] if kernel else joined

    return Form(split, join)


class Rule(NamedTuple):
    """A published tensor and diffusers' tensors in its place; names are relative to their component."""

    ours: str
    theirs: tuple[str, ...]
    form: Form = SAME


def same(ours: str, theirs: str, leaves: Iterable[str] = ("weight", "bias")) -> list[Rule]:
    """Rules of a layer whose parameters are equal on both sides."""
    return [Rule(f"{ours}.{leaf}", (f"{theirs}.{leaf}",)) for leaf in leaves]


def same_layers(ours: str, theirs: str, pairs: Iterable[tuple[str, str]]) -> list[Rule]:
    """Rules of the (our, their) layers inside a block whose parameters are equal on both sides."""
    return [rule for our, their in pairs for rule in same(f"{ours}.{our}", f"{theirs}.{their}")]


def to_theirs(rules: Iterable[Rule], weights: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """A component's tensors under diffusers' names; ConversionError if one is missing."""
    rules = list(rules)
    _check_complete([rule.ours for rule in rules], weights, what)
    return {
        name: part
        for rule in rules
        for name, part in zip(rule.theirs, rule.form.split(weights[rule.ours]), strict=True)
    }


def to_ours(rules: Iterable[Rule], tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """A component's tensors under the published names; ConversionError if one is missing or has a wrong shape."""
    rules = list(rules)
    _check_complete([name for rule in rules for name in rule.theirs], tensors, what)
    joined = {}
    for rule in rules:
        try:
            joined[rule.ours] = rule.form.join([tensors[name] for name in rule.theirs])
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(str(tuple(tensors[name].shape)) for name in rule.theirs)
            raise ConversionError(f"{what}: {rule.theirs[0]} does not fit its config: {shapes}") from error
    return joined


def _check_complete(needed: list[str], found: Mapping[str, Tensor], what: str) -> None:
    missing = [name for name in needed if name not in found]
    if missing:
        raise ConversionError(
            f"{what}: lacks {len(missing)} of the {len(needed)} tensors of its config ({preview(missing)}); "
            f"do the weights belong to this config?"
        )


def first_difference(wanted: NamedTuple, found: NamedTuple) -> str | None:
    """The first field in which two layouts differ, for a message; None if they are equal."""
    for field, value in wanted._asdict().items():
        other = getattr(found, field)
        if other != value:
            if hasattr(value, "_asdict"):
                return first_difference(value, other)
            return f"{field} is {other}, but {value} in the YAML"
    return None


def check_supported(
    where: str, values: Mapping[str, Any], supported: Mapping[str, Any], by: str = "this framework"
) -> None:
    """Raise ConversionError for a value other than the supported one; empty values count as equal."""
    for name, value in supported.items():
        if (values.get(name, value) or None) != (value or None):
            raise ConversionError(f"{where}: {name} {values[name]} is not supported by {by}")


def attention_levels(where: str, config: Mapping[str, Any], known: Mapping[str, bool]) -> tuple[bool, ...]:
    """Which levels have attention, full size first, from diffusers' block types. known: block type -> attention."""
    down, up = config["down_block_types"], config["up_block_types"]
    for block in (*down, *up):
        if block not in known:
            raise ConversionError(f"{where}: block type {block} is not supported; expected one of {', '.join(known)}")
    if [known[block] for block in down] != [known[block] for block in reversed(up)]:
        raise ConversionError(f"{where}: {down} and {up} have attention at different levels")
    return tuple(known[block] for block in down)
