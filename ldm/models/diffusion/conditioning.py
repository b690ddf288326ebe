"""How a condition reaches the network: one normal form, one routing table.

A researcher adds a conditioning key by adding one entry to ROUTES, here or in a package of their own, and naming it in a
YAML (`conditioning_key: ...`): docs/extending.md shows how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.config.instantiate import get_obj_from_str, instantiate_from_config
from ldm.modules.dtype import in_dtype, weights_dtype

Conditioning = Tensor | Sequence[Tensor] | Mapping[str, Any] | None
"""What callers pass: a tensor, a list of tensors, or the normal form itself."""

Parts = dict[str, Any]
"""The normal form: {"c_concat": [(B, C', H, W), ...], "c_crossattn": [(B, L, D), ...], "c_adm": (B,) or (B, D)}, each part optional."""


HALF = (torch.float16, torch.bfloat16)


class Route(NamedTuple):
    """One conditioning key: the parts it needs, where a bare tensor goes, and the network call."""

    needs: tuple[str, ...]
    bare: str | None
    call: Callable[[nn.Module, Tensor, Tensor, Parts], Tensor]


def _channels(x: Tensor, parts: Parts) -> Tensor:
    return torch.cat([x, *parts["c_concat"]], dim=1)  # (B, C + C', H, W)


def _context(parts: Parts) -> Tensor:
    return torch.cat(list(parts["c_crossattn"]), dim=1)  # (B, L, D)


ROUTES: dict[str | None, Route] = {
    None: Route((), None, lambda net, x, t, c: net(x, t)),
    "concat": Route(("c_concat",), "c_concat", lambda net, x, t, c: net(_channels(x, c), t)),
    "crossattn": Route(("c_crossattn",), "c_crossattn", lambda net, x, t, c: net(x, t, context=_context(c))),
    "hybrid": Route(
        ("c_concat", "c_crossattn"), None, lambda net, x, t, c: net(_channels(x, c), t, context=_context(c))
    ),
    "adm": Route(("c_adm",), "c_adm", lambda net, x, t, c: net(x, t, y=c["c_adm"])),
    "crossattn-adm": Route(
        ("c_crossattn", "c_adm"), None, lambda net, x, t, c: net(x, t, context=_context(c), y=c["c_adm"])
    ),
    "hybrid-adm": Route(
        ("c_concat", "c_crossattn", "c_adm"),
        None,
        lambda net, x, t, c: net(_channels(x, c), t, context=_context(c), y=c["c_adm"]),
    ),
}


def route(conditioning_key: str | None) -> Route:
    """The table's entry; ValueError lists the choices."""
    if conditioning_key not in ROUTES:
        raise ValueError(
            f"conditioning_key {conditioning_key!r}: choose one of {', '.join(str(key) for key in ROUTES)}"
        )
    return ROUTES[conditioning_key]


def normalize_condition(cond: Conditioning, conditioning_key: str | None) -> Parts:
    """The normal form of whatever a caller passed; ValueError where the key needs parts that are not there.

    For `adm` a bare tensor and {"c_crossattn": [y]} are accepted, as published callers send them.
    """
    needs, bare, _ = route(conditioning_key)
    if isinstance(cond, Mapping):
        parts = dict(cond)
    elif cond is None or not needs:
        parts = {}
    elif bare is None:
        raise ValueError(
            f"conditioning_key {conditioning_key!r} needs a dict with {', '.join(needs)}, got {type(cond).__name__}"
        )
    else:
        parts = {bare: cond}
    for name in ("c_concat", "c_crossattn"):
        if torch.is_tensor(parts.get(name)):
            parts[name] = [parts[name]]
    if conditioning_key == "adm" and "c_adm" not in parts and parts.get("c_crossattn"):
        parts["c_adm"] = parts.pop("c_crossattn")
    if isinstance(parts.get("c_adm"), Sequence):
        parts["c_adm"] = torch.cat(list(parts["c_adm"])) if len(parts["c_adm"]) > 1 else parts["c_adm"][0]
    missing = [name for name in needs if parts.get(name) is None]
    if missing:
        given = ", ".join(sorted(parts)) or "nothing"
        raise ValueError(f"conditioning_key {conditioning_key!r} needs {', '.join(missing)}; the condition has {given}")
    return parts


def main_part(conditioning_key: str | None) -> str | None:
    """The part that a condition stage's output is: the context where there is one, else channels or labels."""
    needs = route(conditioning_key).needs
    return "c_crossattn" if "c_crossattn" in needs else next(iter(needs), None)


def compose_condition(main: Any, conditioning_key: str | None, further: Mapping[str, Any]) -> Any:
    """A main condition and further parts in the normal form; the main condition as it is where there are none."""
    if not further:
        return main
    part = main_part(conditioning_key)
    return {**further, part: main if part == "c_adm" else [main, *further.get(part, ())]}


def map_main(f: Callable[[Any], Any], cond: Parts, conditioning_key: str | None) -> Parts:
    """`cond`, as compose_condition makes it with further parts, with `f` applied to its main condition."""
    part = main_part(conditioning_key)
    return {**cond, part: f(cond[part]) if part == "c_adm" else [f(cond[part][0]), *cond[part][1:]]}


class DiffusionWrapper(nn.Module):
    """The denoising network behind its conditioning key."""

    def __init__(self, diff_model_config: Any, conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in ROUTES and "target" in diff_model_config:
            get_obj_from_str(diff_model_config["target"])  # a package of one's own adds its keys when it is imported
        route(conditioning_key)
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
        c_adm: Tensor | None = None,
    ) -> Tensor:
        """x: (B, C, H, W), t: (B,) and the parts that the key needs -> (B, C_out, H, W), in the dtype of x.

        A network with 16-bit weights is given its inputs in their dtype.
        """
        given = {"c_concat": c_concat, "c_crossattn": c_crossattn, "c_adm": c_adm}
        parts = normalize_condition(
            {name: part for name, part in given.items() if part is not None}, self.conditioning_key
        )
        dtype = weights_dtype(self.diffusion_model)
        if dtype not in HALF or x.dtype == dtype:
            return route(self.conditioning_key).call(self.diffusion_model, x, t, parts)
        parts = map_tensors(
            lambda leaf: leaf.to(dtype) if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf, parts
        )
        return in_dtype(dtype, lambda x: route(self.conditioning_key).call(self.diffusion_model, x, t, parts), x)


def map_tensors(f: Callable[..., Any], *trees: Any) -> Any:
    """Apply `f` to the leaves of dicts and lists of one shape; ValueError where the shapes differ."""
    first = trees[0]
    if isinstance(first, Mapping):
        if any(not isinstance(tree, Mapping) or set(tree) != set(first) for tree in trees):
            raise ValueError(f"conditions differ in form: {' and '.join(_describe(tree) for tree in trees)}")
        return {key: map_tensors(f, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, (list, tuple)):
        if any(not isinstance(tree, (list, tuple)) or len(tree) != len(first) for tree in trees):
            raise ValueError(f"conditions differ in form: {' and '.join(_describe(tree) for tree in trees)}")
        return [map_tensors(f, *items) for items in zip(*trees)]
    if any(isinstance(tree, (Mapping, list, tuple)) for tree in trees):
        raise ValueError(f"conditions differ in form: {' and '.join(_describe(tree) for tree in trees)}")
    return f(*trees)


def join_conditions(first: Conditioning, second: Conditioning) -> Conditioning:
    """Two conditions of one form as one batch, `first` in front: each tensor (B, ...) becomes (2B, ...)."""

    def join(a: Any, b: Any) -> Any:
        if not torch.is_tensor(a) or not torch.is_tensor(b):
            if torch.is_tensor(a) or torch.is_tensor(b) or a != b:
                raise ValueError(f"conditions differ in {a!r} and {b!r}, which is no tensor and cannot share a batch")
            return a
        if a.shape[1:] != b.shape[1:]:
            raise ValueError(f"conditions of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot share a batch")
        return torch.cat([a, b])

    return map_tensors(join, first, second)


def condition_batch_size(cond: Conditioning) -> int | None:
    """Number of samples that a condition is for; None where it holds no tensor."""
    if torch.is_tensor(cond):
        return cond.shape[0]
    items = cond.values() if isinstance(cond, Mapping) else cond if isinstance(cond, (list, tuple)) else ()
    sizes = (condition_batch_size(item) for item in items)
    return next((size for size in sizes if size is not None), None)


def _describe(tree: Any) -> str:
    if isinstance(tree, Mapping):
        return f"a dict with {sorted(tree)}"
    if isinstance(tree, (list, tuple)):
        return f"a list of {len(tree)}"
    return f"a tensor {tuple(tree.shape)}" if torch.is_tensor(tree) else type(tree).__name__
