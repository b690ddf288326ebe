"""Functions of a sampling run's condition, which no step changes: keys and values of the cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import has_global_hooks
from ldm.modules.prepacked import PrepackedLinear

_FORWARDS = nn.Linear.forward, PrepackedLinear.forward


class _Kept(NamedTuple):
    inputs: tuple[Tensor | None, ...]
    versions: list[int]  # of the inputs and the output
    output: Tensor


class RunConstants:
    """The tensors that are constant in one run, and what `project` and `cast` compute from them within `in_use`.

    It belongs to the run, not to a module. What was computed from a tensor or weight that was replaced or modified in
    place, or was itself modified, is computed again; a modification through `.data`, as `Module.half` makes, has no
    version and is not seen.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}
        self._kept: dict[tuple[object, ...], _Kept] = {}

    def add(self, tensor: Tensor) -> Tensor:
        """Let a tensor be a constant; return it."""
        if not tensor.is_inference():  # these have no version
            self._tensors[id(tensor)] = tensor
        return tensor

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context in which the outputs of this run are used."""
        token = _RUN.set(self)
        try:
            yield
        finally:
            _RUN.reset(token)

    def once(self, key: tuple[object, ...], inputs: tuple[Tensor | None, ...], compute: Callable[[], Tensor]) -> Tensor:
        kept = self._kept.get(key)
        if kept is None or kept.versions != _versions(*inputs, kept.output):
            if kept is not None:
                self._tensors.pop(id(kept.output), None)
            output = compute()
            kept = self._kept[key] = _Kept(inputs, _versions(*inputs, output), output)
        return kept.output


def _versions(*tensors: Tensor | None) -> list[int]:
    return [each._version for each in tensors if each is not None]


_RUN: ContextVar[RunConstants | None] = ContextVar("run", default=None)


def _run_of(tensor: Tensor) -> RunConstants | None:
    """Return the run in use if the tensor is a constant of it; None in compiled code and with gradients."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    run = _RUN.get()
    return run if run is not None and id(tensor) in run._tensors else None


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """Return layer(x); in a run of which x is a constant, a linear layer without hooks is called once."""
    run = _run_of(x)
    if run is None or not isinstance(layer, nn.Linear) or type(layer).forward not in _FORWARDS:
        return layer(x)
    hooked = layer._forward_hooks or layer._forward_pre_hooks or has_global_hooks()
    if hooked or "forward" in vars(layer) or "weight" not in layer._parameters:  # a parametrized weight is computed
        return layer(x)
    weights = layer.weight, layer.bias
    if any(each is not None and each.is_inference() for each in weights):
        return layer(x)
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return run.once((*map(id, (layer, x, *weights)), autocast), (x, *weights), lambda: layer(x))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a dtype; in a run of which x is a constant, it is cast once and the result is another constant."""
    run = _run_of(x)
    if run is None or x.dtype == dtype:
        return x.to(dtype)
    return run.add(run.once((id(x), dtype), (x,), lambda: x.to(dtype)))


def own_copy(x: Tensor) -> Tensor:
    """Return a copy of x, which a network may modify; in a run of which x is a constant, the same one at each step."""
    run = _run_of(x)
    return x.clone() if run is None else run.add(run.once((id(x), "copy"), (x,), x.clone))
