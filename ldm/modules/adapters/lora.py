"""Low-rank adapters of linear and convolution layers (LoRA, Hu et al. 2021, arXiv 2106.09685; DoRA, arXiv 2402.09353).

A layer of weight W computes with W + strength * (adapted(W) - W); in LoRA, adapted(W) = W + alpha / rank * up down. The
adapters are a module beside the networks and add to the outputs of the layers by forward hooks: the networks keep their
classes, state-dict keys and weights.

Networks are given by name, {"unet": ..., "text": ...}, and a layer's key is that name and the path of the layer in it:
`unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q`. The projections that an nn.MultiheadAttention (OpenCLIP) keeps
in one weight have the keys `....attn.q_proj`, `k_proj`, `v_proj`, next to its `out_proj`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from ldm.config.types import Dropout, PositiveFloat, PositiveInt
from ldm.modules.dtype import values_of

_ATTENTION = r"attn\d*\.(to_[qkv]|to_out\.0)|(?<=\.)proj_(in|out)|(?<=\.)qkv"
TARGETS = {
    "attention": rf"unet\..*({_ATTENTION})",
    "feed_forward": r"unet\..*\.ff\.net\.(0\.proj|0\.0|2)",
    "convolutions": r"unet\..*\.(in_layers\.2|emb_layers\.1|out_layers\.3|skip_connection|op|conv)",
    "text_encoder": r"text\..*\.(self_attn\.\w+|attn\.\w+|mlp\.\w+|to_[qkvo]\w*(\.0)?|net\.(0\.proj|0\.0|2))",
}  # kohya's LoRA is all but `convolutions`, its LoCon all of them
_HEADS = ("q_proj", "k_proj", "v_proj")  # rows of nn.MultiheadAttention.in_proj_weight, in this order


@dataclass(frozen=True)
class LoRA:
    """Adapter of one layer with weight W: (O, I) of a linear layer, (O, I, *K) of a convolution.

    down: (R, I, *K), up: (O, R, 1, ...). mid: (R, R, *K) between down (R, I, 1, ...) and up (LyCORIS' Tucker form).
    magnitude: lengths of W's rows, (O, 1, ...), or of its columns, (1, I, 1, ...), in DoRA; None in LoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of W. Raises ValueError if the tensors do not fit together."""
        down, up, mid, rank = self.down, self.up, self.mid, self.rank
        kernel = down.shape[2:] if mid is None else mid.shape[2:]
        ones = torch.Size([1] * len(kernel))
        fits = up.shape[1:] == (rank, *ones) and (
            mid is None or (mid.shape[:2], down.shape[2:]) == ((rank, rank), ones)
        )
        shape = (up.shape[0], down.shape[1], *kernel)
        if fits and self.magnitude is not None:
            fits = tuple(self.magnitude.shape) in ((shape[0], 1, *ones), (1, shape[1], *ones))
        if not fits:
            others = {"up": up, "mid": mid, "magnitude": self.magnitude}
            shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in others.items() if t is not None)
            raise ValueError(f"down {tuple(down.shape)}, {shapes} do not fit together")
        return shape

    def map(self, f: Callable[[Tensor], Tensor]) -> LoRA:
        """Apply `f` to each tensor."""
        mid, magnitude = (None if t is None else f(t) for t in (self.mid, self.magnitude))
        return LoRA(f(self.down), f(self.up), self.alpha, mid, magnitude)

    def product(self) -> Tensor:
        """alpha / rank * up down, float32 in W's shape."""
        up, down = self.up.flatten(1).float(), self.down.float()  # (O, R), (R, I, *K)
        if self.mid is None:
            product = (up @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
        else:
            product = torch.einsum("or,rs...,si->oi...", up, self.mid.float(), down.flatten(1))
        return self.alpha / self.rank * product

    def delta(self, weight: Tensor) -> Tensor:
        """adapted(W) - W, float32: the product; in DoRA, magnitude * (W + product) / |W + product| - W (eq. 5)."""
        product = self.product()
        if self.magnitude is None:
            return product
        weight = values_of(weight)
        adapted = weight + product
        magnitude = self.magnitude.float()
        return magnitude / _lengths(adapted, magnitude).detach() * adapted - weight  # constant lengths: section 4.3


def _lengths(weight: Tensor, like: Tensor) -> Tensor:
    """Lengths of the rows or columns of a weight, in the shape of `like`."""
    axes = [axis for axis, size in enumerate(like.shape) if size == 1 and weight.shape[axis] != 1]
    return torch.linalg.vector_norm(weight, dim=axes, keepdim=True) if axes else weight.abs()


@dataclass(frozen=True)
class LoRASpec:
    """Adapters to train.

    alpha: scale of the product is alpha / rank; None is rank, a scale of 1.
    dropout: of the layers' inputs, in the adapters only.
    targets: names in TARGETS, or regular expressions of whole keys ("unet\\.time_embed\\..*").
    """

    rank: PositiveInt = 4
    alpha: PositiveFloat | None = None
    dropout: Dropout = 0.0
    dora: bool = False
    targets: Sequence[str] = ("attention",)


class _Place(NamedTuple):
    """Weight that an adapter belongs to."""

    layer: nn.Module  # the module that is called: a linear layer, a convolution or an nn.MultiheadAttention
    owner: nn.Module  # the module that has the weight
    name: str  # its attribute in `owner`
    rows: slice | None = None  # of the weight; None is all of them

    @property
    def parameter(self) -> nn.Parameter:
        """The trained parameter, whatever replaces it within a call."""
        parameter = self.owner._parameters[self.name]
        assert parameter is not None
        return parameter

    @property
    def base(self) -> Tensor:
        """The trained weight (O, I, *K)."""
        return self.parameter if self.rows is None else self.parameter[self.rows]


def _place(networks: Mapping[str, nn.Module], key: str) -> _Place:
    """Return the weight of a key. Raises KeyError if no layer that an adapter fits has this key."""
    place = _find(networks, key)
    if place is None:
        raise KeyError(key)
    return place


def _find(networks: Mapping[str, nn.Module], key: str) -> _Place | None:
    part, _, path = key.partition(".")
    parent, _, last = path.rpartition(".")
    network = networks.get(part)
    if network is None:
        return None
    try:
        owner = network.get_submodule(parent)
        if isinstance(owner, nn.MultiheadAttention):
            if last in _HEADS and owner.in_proj_weight is not None:
                width, k = owner.embed_dim, _HEADS.index(last)
                return _Place(owner, owner, "in_proj_weight", slice(k * width, (k + 1) * width))
            return _Place(owner, owner.out_proj, "weight") if last == "out_proj" else None
        layer = network.get_submodule(path)
    except AttributeError:
        return None
    fits = isinstance(layer, nn.Linear) or (isinstance(layer, _ConvNd) and layer.groups == 1 and not layer.transposed)
    return _Place(layer, layer, "weight") if fits and path else None


def networks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The networks of a latent diffusion model that adapters are for: its UNet, and its condition stage if it has one.

    A first stage that is the condition stage too is none of them.
    """
    unet, stage = model.get_submodule("model.diffusion_model"), getattr(model, "cond_stage_model", None)
    if isinstance(stage, nn.Module) and stage is not getattr(model, "first_stage_model", None):
        return {"unet": unet, "text": stage}
    return {"unet": unet}


def adaptable(networks: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return {key: shape of the weight} of every layer that an adapter fits, in the order of the networks' modules."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part, network in networks.items():
        unused = {id(parameter) for parameter in getattr(network, "unused_parameters", tuple)()}
        for path, module in network.named_modules():
            names = (*_HEADS, "out_proj") if isinstance(module, nn.MultiheadAttention) else ("",)
            for key in (f"{part}.{path}.{name}".rstrip(".") for name in names):
                place = _find(networks, key)
                if place is not None and id(place.parameter) not in unused:
                    shapes.setdefault(key, tuple(place.base.shape))  # out_proj is a module and a name of its parent
    return shapes


def find_targets(networks: Mapping[str, nn.Module], targets: Iterable[str]) -> list[str]:
    """Return the keys of the layers that `targets` name; raise ValueError for one that names no layer."""
    keys = list(adaptable(networks))
    found: set[str] = set()
    if not (targets := list(targets)):
        raise ValueError(f"targets []: expected one or more of {', '.join(TARGETS)}, or regular expressions of keys")
    for target in targets:
        try:
            pattern = re.compile(TARGETS.get(target, target))
        except re.error as error:
            raise ValueError(f"targets: {target!r} is not a regular expression: {error}") from None
        matching = {key for key in keys if pattern.fullmatch(key)}
        if not matching:
            raise ValueError(
                f"targets: {target!r} names none of the {len(keys)} layers; choose {', '.join(TARGETS)}, or a regular "
                f"expression of keys such as {keys[0] if keys else 'unet.out.2'}"
            )
        found |= matching
    return [key for key in keys if key in found]


def check(networks: Mapping[str, nn.Module], weights: Mapping[str, LoRA]) -> None:
    """Raise ValueError if a key has no layer or a shape differs, before anything is changed."""
    if not weights:
        raise ValueError("no adapter weights")
    for key, lora in weights.items():
        place = _find(networks, key)
        if place is None:
            raise ValueError(f"{key}: this model has no such layer")
        try:
            shape = lora.shape
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        base = tuple(place.base.shape)
        if shape != base:
            raise ValueError(f"{key}: for a weight {shape}, this model's is {base}: of another base?")


class LoRALayer(nn.Module):
    """The adapter of one layer as parameters `down`, `up`, and `mid` or `magnitude` if it has them."""

    mid: nn.Parameter | None
    magnitude: nn.Parameter | None

    def __init__(self, lora: LoRA, strength: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(lora.down), nn.Parameter(lora.up)
        for name, tensor in (("mid", lora.mid), ("magnitude", lora.magnitude)):
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
        self.alpha, self.strength, self.dropout = lora.alpha, strength, dropout

    @property
    def lora(self) -> LoRA:
        return LoRA(self.down, self.up, self.alpha, self.mid, self.magnitude)

    def delta(self, weight: Tensor) -> Tensor:
        """strength * (adapted(W) - W), float32; dropout sets the same inputs to zero for all positions."""
        lora = self.lora
        if self.dropout and self.training:
            inputs = torch.ones(1, self.down.shape[1], *(1 for _ in self.down.shape[2:]), device=self.down.device)
            lora = LoRA(self.down * F.dropout(inputs, self.dropout), self.up, self.alpha, self.mid, self.magnitude)
        return self.strength * lora.delta(weight)

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        """Return what the adapter adds to layer(x)."""
        if self.magnitude is not None:
            return _apply(layer, x, self.delta(layer.weight).to(x.dtype))  # type: ignore[arg-type]  # a Tensor
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.down.dtype)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        if self.mid is None:
            h = _apply(layer, x, self.down)  # (..., R), or (B, R, h, w) with the layer's kernel, stride and padding
        else:
            h = _apply(layer, _pointwise(x, self.down), self.mid)
        return _pointwise(h * (self.strength * self.alpha / self.down.shape[0]), self.up)


def _apply(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """`layer` with another weight, without its bias."""
    return layer._conv_forward(x, weight, None) if isinstance(layer, _ConvNd) else F.linear(x, weight)


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    convolutions = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
    return F.linear(x, weight) if weight.ndim == 2 else convolutions[weight.ndim](x, weight)


class _Add:
    """Forward hook of a layer. An object and not a closure, so that copies of a model have the copied adapter."""

    def __init__(self, adapter: LoRALayer) -> None:
        self.adapter = adapter

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self.adapter(args[0], layer).to(output.dtype)


class _Replace:
    """Hooks of an nn.MultiheadAttention, which reads its weights itself: they are replaced within its call."""

    def __init__(self, adapter: LoRALayer, key: str) -> None:
        self.adapter, self.key = adapter, key

    def place(self, layer: nn.Module) -> _Place:
        return _place({"": nn.ModuleDict({"attn": layer})}, f".attn.{self.key}")

    def before(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        place = self.place(layer)
        current: Tensor = getattr(place.owner, place.name)
        delta = self.adapter.delta(place.base).to(current.dtype)
        if place.rows is not None:
            delta = F.pad(delta, (0, 0, place.rows.start, len(current) - place.rows.stop))
        vars(place.owner)[place.name] = current + delta  # found before the parameter

    def after(self, layer: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        place = self.place(layer)
        vars(place.owner).pop(place.name, None)


class Adapters(nn.Module):
    """Adapters of some layers, as submodules under the layers' keys, in effect until `remove`.

    A model that registers it moves, casts and saves it; the parameters may be trained.
    """

    def __init__(
        self, networks: Mapping[str, nn.Module], weights: Mapping[str, LoRA], strength: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check(networks, weights)
        self._handles: list[RemovableHandle] = []
        for key, lora in weights.items():
            place = _place(networks, key)
            adapter = LoRALayer(lora, strength, dropout)
            self._add(key, adapter)
            layer = place.layer
            if isinstance(layer, nn.MultiheadAttention):
                hook = _Replace(adapter, key.rpartition(".")[2])
                self._handles.append(layer.register_forward_pre_hook(hook.before))
                self._handles.append(layer.register_forward_hook(hook.after, always_call=True))
            else:
                self._handles.append(layer.register_forward_hook(_Add(adapter)))

    def _add(self, key: str, adapter: LoRALayer) -> None:
        parent: nn.Module = self
        *path, last = key.split(".")
        for name in path:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent._modules[name]  # type: ignore[assignment]  # a Module
        parent.add_module(last, adapter)

    def layers(self) -> dict[str, LoRALayer]:
        """The adapters by the keys of their layers."""
        return {key: module for key, module in self.named_modules() if isinstance(module, LoRALayer)}

    def weights(self) -> dict[str, LoRA]:
        """The adapters' weights by the keys of their layers; the tensors are the parameters', without gradient."""
        return {key: layer.lora.map(Tensor.detach) for key, layer in self.layers().items()}

    @torch.no_grad()
    def measure_magnitudes(self, networks: Mapping[str, nn.Module]) -> None:
        """Set the magnitudes of new DoRA layers to the lengths in the weights, which were loaded since."""
        for key, layer in self.layers().items():
            if layer.magnitude is not None:
                layer.magnitude.copy_(_lengths(_place(networks, key).base.float(), layer.magnitude))

    def remove(self) -> None:
        """Take the adapters out of the layers, which compute as before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def inject(networks: Mapping[str, nn.Module], spec: LoRASpec) -> Adapters:
    """Add new adapters that change nothing yet (up is 0), in float32 on the layers' devices, for training.

    Raises ValueError for targets without a layer and for a rank that no layer can have.
    """
    weights, keys = {}, find_targets(networks, spec.targets)
    shapes = [_place(networks, key).base.shape for key in keys]
    full = max(min(shape[0], shape[1:].numel()) for shape in shapes)  # the product has no more than this
    if spec.rank > full:
        raise ValueError(f"rank {spec.rank}: these layers have ranks of {full} or less; 4 to 64 is usual")
    for key in keys:
        place = _place(networks, key)
        base = place.base
        ones = [1] * (base.ndim - 2)
        down = torch.empty(spec.rank, *base.shape[1:], device=base.device)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        up = torch.zeros(base.shape[0], spec.rank, *ones, device=base.device)
        magnitude = None
        if spec.dora:
            magnitude = _lengths(values_of(base), torch.empty(base.shape[0], 1, *ones))  # (O, 1, ...)
        weights[key] = LoRA(down, up, float(spec.alpha or spec.rank), magnitude=magnitude)
    return Adapters(networks, weights, 1.0, spec.dropout)


def apply(networks: Mapping[str, nn.Module], weights: Mapping[str, LoRA], strength: float = 1.0) -> Adapters:
    """Add trained adapters that stay apart from the weights, in the layers' dtypes and on their devices.

    Raises ValueError for a key or shape that does not fit, before anything is changed. Call it again for more adapters.
    """
    check(networks, weights)
    cast = {key: lora.map(partial(_copy_like, _place(networks, key).base)) for key, lora in weights.items()}
    return Adapters(networks, cast, strength).requires_grad_(False)


def _copy_like(base: Tensor, tensor: Tensor) -> Tensor:
    return tensor.detach().to(base, copy=True)
