"""Routing of conditions to the network: one normal form, one table.

A new conditioning key is one entry in ROUTES, added here or in a package of your own, and named in a YAML
(`conditioning_key: ...`); docs/extending.md shows how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.config.instantiate import get_obj_from_str, instantiate_from_config
from ldm.modules.dtype import in_dtype, weights_dtype
from ldm.modules.run_constants import cast, own_copy

Conditioning = Tensor | Sequence[Tensor] | Mapping[str, Any] | None
"""Condition as callers pass it: a tensor, a list of tensors, or the normal form."""

Parts = dict[str, Any]
"""Normal form, an open dict: {"c_concat": [(B, C', H, W), ...], "c_crossattn": [(B, L, D), ...], "c_adm": (B[, D])}.

Parts of other names reach the call of a route unchanged."""

LISTS = ("c_concat", "c_crossattn")  # parts that are lists of tensors


class Route(NamedTuple):
    """One conditioning key: the parts it needs, the part of a bare tensor (None: a dict is required), and the call."""

    needs: tuple[str, ...]
    bare: str | None
    call: Callable[[nn.Module, Tensor, Tensor, Parts], Tensor]


def _channels(x: Tensor, parts: Parts) -> Tensor:
    return torch.cat([x, *parts["c_concat"]], dim=1)  # (B, C + C', H, W)


def joined_context(parts: Parts) -> Tensor:
    """Return the context (B, L, D) of the normal form."""
    first, *further = parts["c_crossattn"]
    return torch.cat([first, *further], dim=1) if further else own_copy(first)


ROUTES: dict[str | None, Route] = {
    None: Route((), None, lambda net, x, t, c: net(x, t)),
    "concat": Route(("c_concat",), "c_concat", lambda net, x, t, c: net(_channels(x, c), t)),
    "crossattn": Route(("c_crossattn",), "c_crossattn", lambda net, x, t, c: net(x, t, context=joined_context(c))),
    "hybrid": Route(
        ("c_concat", "c_crossattn"), None, lambda net, x, t, c: net(_channels(x, c), t, context=joined_context(c))
    ),
    "adm": Route(("c_adm",), "c_adm", lambda net, x, t, c: net(x, t, y=c["c_adm"])),
    "crossattn-adm": Route(
        ("c_crossattn", "c_adm"), None, lambda net, x, t, c: net(x, t, context=joined_context(c), y=c["c_adm"])
    ),
    "hybrid-adm": Route(
        ("c_concat", "c_crossattn", "c_adm"),
        None,
        lambda net, x, t, c: net(_channels(x, c), t, context=joined_context(c), y=c["c_adm"]),
    ),
}


def route(conditioning_key: str | None) -> Route:
    """Return the entry of the table. Raises ValueError with the choices for an unknown key."""
    if conditioning_key not in ROUTES:
        raise ValueError(f"conditioning_key {conditioning_key!r}: choose one of {', '.join(map(str, ROUTES))}")
    return ROUTES[conditioning_key]


def normalize_condition(cond: Conditioning, conditioning_key: str | None) -> Parts:
    """Return the normal form of a condition. Raises ValueError if parts that the key needs are missing.

    For `adm` a bare tensor and {"c_crossattn": [y]} are accepted, as published callers send them.
    """
    needs, bare, _ = route(conditioning_key)
    if isinstance(cond, Mapping):
        parts = {name: part for name, part in cond.items() if part is not None}
    elif cond is None or not needs:
        parts = {}
    elif bare is None:
        raise ValueError(
            f"conditioning_key {conditioning_key!r} needs a dict with {', '.join(needs)}, got {type(cond).__name__}"
        )
    else:
        parts = {bare: cond}
    for name in LISTS:
        if torch.is_tensor(parts.get(name)):
            parts[name] = [parts[name]]
    if conditioning_key == "adm" and "c_adm" not in parts and parts.get("c_crossattn"):
        parts["c_adm"] = parts.pop("c_crossattn")
    if isinstance(parts.get("c_adm"), Sequence):
        parts["c_adm"] = torch.cat(list(parts["c_adm"])) if len(parts["c_adm"]) > 1 else parts["c_adm"][0]
    missing = [name for name in needs if name not in parts]
    if missing:
        given = ", ".join(sorted(parts)) or "nothing"
        raise ValueError(f"conditioning_key {conditioning_key!r} needs {', '.join(missing)}; the condition has {given}")
    return parts


def main_part(conditioning_key: str | None) -> str | None:
    """Return the part that a condition stage outputs: the context if the key needs one, else channels or labels."""
    needs = route(conditioning_key).needs
    return "c_crossattn" if "c_crossattn" in needs else next(iter(needs), None)


def compose_condition(main: Any, conditioning_key: str | None, further: Mapping[str, Any]) -> Any:
    """Join a main condition and further parts in the normal form; without further parts return the main condition."""
    part = main_part(conditioning_key)
    if not further or part is None:
        return main
    return {**further, part: [main, *further.get(part, ())] if part in LISTS else main}


def map_main(f: Callable[[Any], Any], cond: Parts, conditioning_key: str | None) -> Parts:
    """Apply `f` to the main condition of a composed condition."""
    part = main_part(conditioning_key)
    if part is None:
        return cond
    return {**cond, part: [f(cond[part][0]), *cond[part][1:]] if part in LISTS else f(cond[part])}


class DiffusionWrapper(nn.Module):
    """The denoising network behind its conditioning key."""

    def __init__(self, diff_model_config: Any, conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in ROUTES and "target" in diff_model_config:
            get_obj_from_str(diff_model_config["target"])  # importing a package of the user's adds its keys
        route(conditioning_key)
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(self, x: Tensor, t: Tensor, **parts: Any) -> Tensor:
        """Return the network output (B, C_out, H, W) in the dtype of x (B, C, H, W), at t (B,).

        `parts` are those of `normalize_condition`.
        """
        return self.call(route(self.conditioning_key).call, x, t, parts)

    def call(
        self, call: Callable[[nn.Module, Tensor, Tensor, Parts], Tensor], x: Tensor, t: Tensor, parts: Parts
    ) -> Tensor:
        """Return `call(network, x, t, parts)` in the dtype of x; a network with 16-bit weights gets them in its own."""
        dtype = weights_dtype(self.diffusion_model)
        if dtype not in (torch.float16, torch.bfloat16) or x.dtype == dtype:
            out = call(self.diffusion_model, x, t, parts)
            graphs = out.is_cuda and self.diffusion_model._compiled_call_impl is not None and not out.requires_grad
            return out.clone() if graphs else out  # the next replay of a CUDA graph writes to the same memory
        half = map_tensors(lambda part: cast(part, dtype) if part.is_floating_point() else part, parts)
        return in_dtype(dtype, lambda x: call(self.diffusion_model, x, t, half), x)


def map_leaves(f: Callable[..., Any], *conditions: Any) -> Any:
    """Apply `f` to the leaves of conditions of one form. Raises ValueError if their forms differ."""
    first = conditions[0]
    if isinstance(first, Mapping):
        same = all(isinstance(other, Mapping) and set(other) == set(first) for other in conditions)
    elif isinstance(first, (list, tuple)):
        same = all(isinstance(other, (list, tuple)) and len(other) == len(first) for other in conditions)
    else:
        same = not any(isinstance(other, (Mapping, list, tuple)) for other in conditions)
    if not same:
        raise ValueError(f"conditions differ in form: {' and '.join(map(_describe, conditions))}")
    if isinstance(first, Mapping):
        return {key: map_leaves(f, *(other[key] for other in conditions)) for key in first}
    if isinstance(first, (list, tuple)):
        return [map_leaves(f, *items) for items in zip(*conditions)]
    return f(*conditions)


def map_tensors(f: Callable[[Tensor], Any], condition: Any) -> Any:
    """Apply `f` to the tensors of a condition."""
    return map_leaves(lambda leaf: f(leaf) if torch.is_tensor(leaf) else leaf, condition)


def join_conditions(first: Conditioning, second: Conditioning) -> Conditioning:
    """Join two conditions of one form to one batch, `first` in front: each tensor (B, ...) becomes (2B, ...)."""

    def join(a: Any, b: Any) -> Any:
        if not torch.is_tensor(a) or not torch.is_tensor(b):
            if torch.is_tensor(a) or torch.is_tensor(b) or a != b:
                raise ValueError(f"conditions that are not tensors must be equal to share a batch, got {a!r} and {b!r}")
            return a
        if a.shape[1:] != b.shape[1:]:
            raise ValueError(f"conditions of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot share a batch")
        return torch.cat([a, b])

    return map_leaves(join, first, second)


def condition_batch_size(cond: Conditioning) -> int | None:
    """Return the number of samples of a condition; None if it holds no tensor."""
    if torch.is_tensor(cond):
        return cond.shape[0]
    items = cond.values() if isinstance(cond, Mapping) else cond if isinstance(cond, (list, tuple)) else ()
    sizes = (condition_batch_size(item) for item in items)
    return next((size for size in sizes if size is not None), None)


def _describe(condition: Any) -> str:
    if isinstance(condition, Mapping):
        return f"a dict with {sorted(condition)}"
    if isinstance(condition, (list, tuple)):
        return f"a list of {len(condition)}"
    return f"a tensor {tuple(condition.shape)}" if torch.is_tensor(condition) else type(condition).__name__
