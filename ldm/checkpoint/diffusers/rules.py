"""How a tensor under its published name relates to the tensors that diffusers keeps in its place: the same one, reshaped, or split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class InterchangeError(ValueError):
    """A model, file or folder that cannot be converted, in one line."""


class Form(NamedTuple):
    """Two inverse maps between the published tensor and diffusers' ones."""

    split: Callable[[Tensor], list[Tensor]]
    join: Callable[[list[Tensor]], Tensor]


SAME = Form(lambda tensor: [tensor], lambda parts: parts[0])
"""One tensor, the same on both sides."""

CONV2D = Form(lambda tensor: [tensor.flatten(1)], lambda parts: parts[0].flatten(1)[:, :, None, None])
"""A 1x1 convolution (O, I, 1, 1) here, a linear layer (O, I) there (old folders keep the convolution)."""

CONV1D = Form(lambda tensor: [tensor.flatten(1)], lambda parts: parts[0].flatten(1)[:, :, None])
"""A convolution over sequences (O, I, 1) here, a linear layer (O, I) there."""

STACKED = Form(lambda tensor: list(tensor.chunk(3)), lambda parts: _cat(parts))
"""Queries, keys and values one above the other here, three tensors there."""


def by_head(heads: int, kernel: int) -> Form:
    """Queries, keys and values of each head one above the other here, (H * 3 * D, ...), three tensors there.

    kernel: axes of length 1 behind the weight's two, which linear layers lack; 0 for a bias.
    """

    def split(tensor: Tensor) -> list[Tensor]:
        grouped = tensor.unflatten(0, (heads, 3, -1))  # (H, 3, D, ...)
        parts = (grouped[:, k].flatten(0, 1) for k in range(3))  # (H * D, ...)
        return [part.flatten(1) if kernel else part for part in parts]

    def join(parts: list[Tensor]) -> Tensor:
        grouped = [part.unflatten(0, (heads, 1, -1)) for part in parts]  # (H, 1, D, ...)
        joined = _cat(grouped, 1).flatten(0, 2)
        return joined.flatten(1)[(..., *[None] * kernel)] if kernel else joined

    return Form(split, join)


def _cat(parts: list[Tensor], dim: int = 0) -> Tensor:
    import torch

    return torch.cat(parts, dim)


class Rule(NamedTuple):
    """One published tensor and the tensors of diffusers in its place; names are those inside their component."""

    ours: str
    theirs: tuple[str, ...]
    form: Form = SAME


def same(ours: str, theirs: str, leaves: Iterable[str] = ("weight", "bias")) -> list[Rule]:
    """Rules of a layer whose parameters are the same on both sides."""
    return [Rule(f"{ours}.{leaf}", (f"{theirs}.{leaf}",)) for leaf in leaves]


def to_theirs(rules: Iterable[Rule], weights: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The component's tensors in diffusers' names; InterchangeError where one that the rules need is missing."""
    rules = list(rules)
    _check_complete([rule.ours for rule in rules], weights, what)
    return {
        name: part
        for rule in rules
        for name, part in zip(rule.theirs, rule.form.split(weights[rule.ours]), strict=True)
    }


def to_ours(rules: Iterable[Rule], tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The component's tensors in the published names; InterchangeError where one that the rules need is missing."""
    rules = list(rules)
    _check_complete([name for rule in rules for name in rule.theirs], tensors, what)
    joined = {}
    for rule in rules:
        try:
            joined[rule.ours] = rule.form.join([tensors[name] for name in rule.theirs])
        except (RuntimeError, IndexError) as error:  # shapes that the config does not allow
            shapes = ", ".join(str(tuple(tensors[name].shape)) for name in rule.theirs)
            raise InterchangeError(f"{what}: {rule.theirs[0]} does not fit its config: {shapes}") from error
    return joined


def _check_complete(needed: list[str], there: Mapping[str, Tensor], what: str) -> None:
    missing = [name for name in needed if name not in there]
    if missing:
        raise InterchangeError(
            f"{what}: lacks {len(missing)} of {len(needed)} tensors its config asks for ({', '.join(missing[:3])}); is it the right one?"
        )


def first_difference(wanted: NamedTuple, found: NamedTuple) -> str | None:
    """The first field in which two layouts differ, as "field found, wanted ..."; None where they agree."""
    for field, value in wanted._asdict().items():
        other = getattr(found, field)
        if other != value:
            return f"{field} is {other} there and {value} in the YAML"
    return None
