"""LoRA files: kohya's (LoRA, LoCon), diffusers' and peft's names of layers and tensors, and back.

A layer's key is "unet" or "text" and its path in the UNet or the condition stage; queries, keys and values that
OpenCLIP keeps in one weight are layers of their own (`ldm.modules.adapters.lora`). Files name layers as diffusers or as
this framework does, with dots or with underscores in their place.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.checkpoint.diffusers import text
from ldm.checkpoint.diffusers.files import read_json
from ldm.checkpoint.diffusers.plan import CONDITION, UNET, plan_of
from ldm.checkpoint.diffusers.rules import ConversionError
from ldm.checkpoint.formats import CheckpointError, read_metadata, read_state
from ldm.checkpoint.write import write_weights

logger = logging.getLogger(__name__)

KOHYA, DIFFUSERS = "kohya", "diffusers"
RUN_FILE = "lora.safetensors"  # of a training run, in its folder of checkpoints
STYLES = (KOHYA, DIFFUSERS)
PREFIX = {"unet": UNET, "text": CONDITION}  # of the published names of the layers
_KOHYA_PREFIX = {"unet": "lora_unet_", "text": "lora_te_"}
_DIFFUSERS_PREFIX = {"unet": "unet.", "text": "text_encoder."}
HEADS = ("q_proj", "k_proj", "v_proj")
_PREFIXES = (  # beginning of a module's name in a file -> the network; other names may be of both
    (re.compile(r"lora_unet_|unet\.|(model\.)?diffusion_model\."), "unet"),
    (re.compile(r"lora_te1?_|text_encoder\.|cond_stage_model\."), "text"),
)
_RENAMES = (  # spellings of tensors -> kohya's
    (re.compile(r"base_model\.model\."), ""),
    (re.compile(r"\.processor\."), "."),
    (re.compile(r"\.to_([qkv]|out)_lora\."), r".to_\1.lora."),
    (re.compile(r"\.(?:lora|lora_linear_layer)\.(down|up)\.weight"), r".lora_\1.weight"),
    (re.compile(r"\.lora_A(?:\.\w+)?\.weight$"), ".lora_down.weight"),
    (re.compile(r"\.lora_B(?:\.\w+)?\.weight$"), ".lora_up.weight"),
    (re.compile(r"\.lora_down\.weight\.alpha$"), ".alpha"),
    (re.compile(r"\.lora_magnitude_vector(?:\.\w+)*$"), ".magnitude"),
)
_TENSOR = re.compile(
    r"(?P<module>.+)\.(?P<role>lora_down\.weight|lora_up\.weight|lora_mid\.weight|alpha|dora_scale|magnitude)"
)
_FOREIGN = (  # keys of other files -> what they are
    (
        re.compile(r"\.(hada_|lokr_|oft_|boft_|glora_|(a|b)[12]\.weight|on_input$|diff(_b)?$)"),
        "a LyCORIS adapter of another kind than LoRA or LoCon",
    ),
    (
        re.compile(r"lora_te[23]_|text_encoder_[23]\.|conditioner\.|add_embedding|label_emb"),
        "an adapter for Stable Diffusion XL",
    ),
    (
        re.compile(r"^(lora_)?transformer[._]|(double|single|joint)_(transformer_)?blocks"),
        "an adapter for a diffusion transformer",
    ),
    (re.compile(r"string_to_(param|token)|emb_params|clip_[lg]$|bundle_emb|<.+>$"), "a textual inversion embedding"),
    (re.compile(r"control_model|controlnet|lllite"), "a ControlNet"),
    (re.compile(r"motion_modules"), "a motion module"),
    (re.compile(r"^(adapters\.|model_ema\.adapters)"), f"the checkpoint of a run, which has {RUN_FILE} beside it"),
    (
        re.compile(r"^(?!.*lora).*\.(weight|bias)$"),
        "weights of a model",
    ),
)


class LoraTensors(NamedTuple):
    """Adapter of a layer with weight (O, I, *K), see `ldm.modules.adapters.lora.LoRA`."""

    down: Tensor  # (R, I, *K)
    up: Tensor  # (O, R, 1, ...)
    alpha: float
    mid: Tensor | None = None  # (R, R, *K)
    magnitude: Tensor | None = None  # (O, 1, ...) or (1, I, 1, ...)


class LoraNames:
    """Names in files of the layers of a model.

    shapes: {key: shape of the weight} of every layer that an adapter fits; config: of the model, with its key `model`.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> None:
        self.shapes = {key: tuple(shape) for key, shape in shapes.items()}
        self._theirs = {key: name for key, name in _diffusers_names(config) if key in self.shapes}
        self._keys: dict[tuple[str, str], str] = {}  # (network, name with underscores) -> key
        for key in self.shapes:
            network, _, path = key.partition(".")
            for name in (path, *self._aliases(key)):
                self._keys[network, name.replace(".", "_")] = key

    def _aliases(self, key: str) -> Iterable[str]:
        """Names of a layer in diffusers' terms, also those of older and newer versions."""
        name = self._theirs.get(key)
        if name is not None:
            yield name
            yield name.removeprefix("text_model.")  # transformers from 5.6
            yield re.sub(
                r"\.(to_out)\.0$", r".\1", re.sub(r"\.([qkv]|out)_proj$", r".to_\1", name)
            )  # diffusers before 0.18

    def key(self, module: str) -> str | None:
        """The key of a layer by its name in a file; None if the model has no such layer."""
        networks: Iterable[str] = _KOHYA_PREFIX
        for pattern, network in _PREFIXES:
            if match := pattern.match(module):
                module, networks = module[match.end() :], [network]
                break
        flat = module.replace(".", "_")
        return next((self._keys[network, flat] for network in networks if (network, flat) in self._keys), None)

    def module(self, key: str, style: str = KOHYA) -> str:
        """The name of a layer in a file; layers that diffusers lacks have this framework's names."""
        network, _, path = key.partition(".")
        name = self._theirs.get(key, path)
        if style == DIFFUSERS:
            return _DIFFUSERS_PREFIX[network] + name
        return _KOHYA_PREFIX[network] + name.replace(".", "_")


def _diffusers_names(config: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """(key, diffusers' name) of the layers of a model; nothing for one that diffusers does not support."""
    params = config["model"].get("params") or {}
    base = {name: value for name, value in params.items() if name != "control_stage_config"}  # of a ControlLDM
    try:
        components = plan_of({"model": {**config["model"], "params": base}}).components
    except ConversionError:
        return
    for part in components:
        network = "unet" if part.prefix == UNET else "text"
        if part.prefix not in (UNET, *text.PREFIX.values()):
            continue
        inner = part.prefix.removeprefix(PREFIX[network])
        for rule in part.layout.rules():
            if not rule.theirs[0].endswith(".weight"):
                continue
            ours, is_weight, _ = rule.ours.rpartition(".weight")
            if len(rule.theirs) == 1 and is_weight:
                yield f"{network}.{inner}{ours}", rule.theirs[0].removesuffix(".weight")
            elif rule.ours.endswith(".in_proj_weight"):
                for head, name in zip(HEADS, rule.theirs, strict=True):
                    yield (
                        f"{network}.{inner}{rule.ours.removesuffix('in_proj_weight')}{head}",
                        name.removesuffix(".weight"),
                    )


# ------------------------------------------------------------------------------------------------------------- reading


def lora_file(path: Path) -> Path:
    """The file of an adapter; of a folder, the one that peft, diffusers or a training run writes into it."""
    if not path.is_dir():
        return path
    names = [
        f"{stem}{ending}" for stem in ("adapter_model", "pytorch_lora_weights") for ending in (".safetensors", ".bin")
    ]
    names += [RUN_FILE, f"checkpoints/{RUN_FILE}"]
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{path}: no LoRA in this folder ({', '.join(names)}); pass the file itself")
    return found


def read_lora(path: Path, names: LoraNames) -> dict[str, LoraTensors]:
    """The adapters in a file or folder, by the keys of their layers, in the file's dtype.

    Raises CheckpointError for a key, shape or value that does not fit the model: an adapter is never read in part.
    """
    path = lora_file(path)
    scales = _Scales(path)
    found: dict[str, _Layer] = {}
    unknown: dict[str, tuple[Any, bool]] = {}  # name -> (value, whether it is spelled as a tensor of a LoRA)
    for name, value in read_state(path).items():
        spelling = name = str(name)
        for pattern, replacement in _RENAMES:
            spelling = pattern.sub(replacement, spelling)
        match = _TENSOR.fullmatch(spelling)
        key = names.key(match["module"]) if match else None
        if match is None or key is None:
            unknown[name] = value, match is not None
            continue
        layer = found.setdefault(key, _Layer(path, match["module"], names.shapes[key], {}))
        if match["role"] in layer.values:
            raise CheckpointError(f"{path}: {layer.values[match['role']][0]} and {name} are of the same layer")
        layer.values[match["role"]] = name, value
    if unknown:
        raise _unknown_error(path, unknown)
    if not found:
        raise CheckpointError(f"{path}: holds no tensors of a LoRA")
    return {key: layer.tensors(scales) for key, layer in found.items()}


def _unknown_error(path: Path, unknown: Mapping[str, tuple[Any, bool]]) -> CheckpointError:
    """Name one of the unknown tensors: the first that tells what the file is, else the first."""
    what, name = next(
        ((what, name) for pattern, what in _FOREIGN for name in unknown if pattern.search(name)),
        ("", next(iter(unknown))),
    )
    value, is_lora = unknown[name]
    shape = f" {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
    if what:
        problem = f"{what}, not a LoRA of this model"
    elif is_lora:
        problem = "this model has no such layer; the LoRA is of another base"
    else:
        problem = "not a tensor of a LoRA"
    return CheckpointError(f"{path}: {name[:200]}{shape}{more}: {problem}")


class _Scales:
    """Scales that peft keeps beside the tensors: in adapter_config.json, or in the metadata of diffusers' files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        own = path.with_name("adapter_config.json")
        options: Any = {}
        if path.name.startswith("adapter_model.") and own.is_file():
            self.path, options = own, read_json(own)
        else:
            text = read_metadata(path).get("lora_adapter_metadata", "{}")
            try:
                options = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"{path}: invalid lora_adapter_metadata ({error})") from error
        self.options: dict[str, dict[str, Any]] = {}  # "unet", "text_encoder" or "" -> peft's LoraConfig
        for name, value in options.items() if isinstance(options, dict) else ():
            network, dot, option = name.partition(".")
            network, option = (network, option) if dot else ("", name)
            self.options.setdefault(network, {})[option] = value
        for config in self.options.values():
            self._check(config)

    def _check(self, config: Mapping[str, Any]) -> None:
        kind, start = config.get("peft_type", "LORA"), config.get("init_lora_weights")
        if kind != "LORA":
            raise CheckpointError(f"{self.path}: peft_type {kind!r} is not supported; expected LORA")
        if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq")):
            raise CheckpointError(
                f"{self.path}: init_lora_weights {start!r} changed the base weights, which the file lacks; save the "
                "adapter with peft's path_initial_model_for_weight_conversion"
            )

    def alpha(self, module: str, rank: int) -> float:
        """alpha of a layer that has none of its own; by default the rank, a scale of 1."""
        network, dot, inner = module.partition(".")
        if network not in self.options or not dot:
            network, inner = "", module
        config = self.options.get(network, {})
        value, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
        for pattern, special in patterns.items() if isinstance(patterns, dict) else ():
            name = pattern.removeprefix("^").replace(r"\.", ".").removesuffix("$")
            if re.search(r"[^\w.]", name):  # untrusted regular expressions are not run
                raise CheckpointError(
                    f"{self.path}: alpha_pattern {pattern!r} is not supported; expected names of layers"
                )
            if inner == name or inner.endswith(f".{name}"):
                value = special
                break  # the first that fits counts, as in peft
        if value is None:
            return float(rank)
        return _alpha(self.path, "lora_alpha", value) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


class _Layer(NamedTuple):
    """Contents of a file for one layer."""

    path: Path
    module: str  # the layer's name in the file
    shape: tuple[int, ...]  # of the model's weight, (O, I, *K)
    values: dict[str, tuple[str, Any]]  # role -> (name in the file, value)

    def tensors(self, scales: _Scales) -> LoraTensors:
        """The adapter; CheckpointError if its tensors do not fit each other or the model."""
        for role in ("lora_down.weight", "lora_up.weight"):
            if role not in self.values:
                other = next(iter(self.values.values()))[0]
                raise CheckpointError(
                    f"{self.path}: {other} has no {role.removesuffix('.weight')}: the file is incomplete"
                )
        out, inputs, *kernel = self.shape
        ones, given = [1] * len(kernel), self._tensor("lora_down.weight").shape
        if len(given) < 2 or given[0] == 0:
            raise self._misfit("lora_down.weight", f"expected (rank, {inputs}, ...) with a rank of 1 or more")
        rank = given[0]
        mid = None
        if "lora_mid.weight" in self.values:
            mid, kernel = self._shaped("lora_mid.weight", (rank, rank, *kernel)), ones
        up = self._shaped("lora_up.weight", (out, rank, *ones))
        down = self._shaped("lora_down.weight", (rank, inputs, *kernel))
        alpha = scales.alpha(self.module, rank)
        if "alpha" in self.values:
            alpha = _alpha(self.path, *self.values["alpha"])
        return LoraTensors(down, up, alpha, mid, self._magnitude())

    def _magnitude(self) -> Tensor | None:
        """DoRA's magnitudes: of the rows, or of the columns as in the first versions of LyCORIS."""
        out, inputs, *kernel = self.shape
        ones = [1] * len(kernel)
        if "magnitude" in self.values:  # peft's: (O,), or (1, O, 1, 1) of a convolution
            value = self._tensor("magnitude")
            given = value.reshape(-1) if value.shape == (1, out, *ones) else value
            return self._shaped("magnitude", (out, 1, *ones), given)
        if "dora_scale" not in self.values:
            return None
        columns = self._tensor("dora_scale").shape[:2] == (1, inputs) and out != 1
        return self._shaped("dora_scale", (1, inputs, *ones) if columns else (out, 1, *ones))

    def _tensor(self, role: str) -> Tensor:
        """A tensor of finite floating-point numbers that the file really holds."""
        name, value = self.values[role]
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
            kind = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{self.path}: {name} is {kind}; expected floating-point numbers")
        if value.is_meta or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{self.path}: {name} {tuple(value.shape)}: the file holds fewer numbers")
        if not torch.isfinite(value.float()).all():
            raise CheckpointError(f"{self.path}: {name} has values that are not finite")
        return value

    def _shaped(self, role: str, shape: tuple[int, ...], value: Tensor | None = None) -> Tensor:
        """A tensor in `shape`; axes of length 1 at its end may be missing or too many."""
        value = self._tensor(role) if value is None else value
        if _without_ones(value.shape) != _without_ones(shape):
            raise self._misfit(
                role, f"expected {shape} for this model's weight {self.shape}; the LoRA is of another base"
            )
        return value.reshape(shape)

    def _misfit(self, role: str, problem: str) -> CheckpointError:
        name, value = self.values[role]
        return CheckpointError(f"{self.path}: {name} {tuple(value.shape)}: {problem}")


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the axes of length 1 after the second one."""
    kept = list(shape) + [1] * (2 - len(shape))
    while len(kept) > 2 and kept[-1] == 1:
        kept.pop()
    return tuple(kept)


def _alpha(path: Path, name: str, value: Any) -> float:
    """A finite positive number, or a tensor with one."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool:
        value = value.float().item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        shown = repr(value)[:60] if isinstance(value, float | str) else f"a {type(value).__name__}"
        shown += f" {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise CheckpointError(f"{path}: {name} is {shown}; expected one positive number")
    return float(value)


# ------------------------------------------------------------------------------------------------------------- writing


def lora_tensors(adapters: Mapping[str, LoraTensors], names: LoraNames, style: str = KOHYA) -> dict[str, Tensor]:
    """The tensors of a file in a style; `read_lora` gives the adapters back.

    Files of diffusers have no alpha: the scale alpha / rank goes into `up`. ConversionError for what a style lacks,
    ValueError for an unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"style {style!r}: choose one of {', '.join(STYLES)}")
    tensors: dict[str, Tensor] = {}
    for key, adapter in adapters.items():
        module, rank = names.module(key, style), adapter.down.shape[0]
        if style == KOHYA:
            tensors |= {f"{module}.lora_down.weight": adapter.down, f"{module}.lora_up.weight": adapter.up}
            tensors[f"{module}.alpha"] = torch.tensor(float(adapter.alpha))
            others = {"lora_mid.weight": adapter.mid, "dora_scale": adapter.magnitude}
            tensors |= {f"{module}.{role}": tensor for role, tensor in others.items() if tensor is not None}
            continue
        if adapter.mid is not None:
            raise ConversionError(f"{module}: diffusers has no LoRA with a middle tensor (lora_mid); use {KOHYA}")
        up = adapter.up
        if adapter.alpha != rank:
            up = (up.float() * (adapter.alpha / rank)).to(up.dtype)
        tensors |= {f"{module}.lora_A.weight": adapter.down, f"{module}.lora_B.weight": up}
        if (magnitude := adapter.magnitude) is not None:
            if magnitude.shape[0] != up.shape[0]:
                raise ConversionError(f"{module}: diffusers has no DoRA with magnitudes of columns; use {KOHYA}")
            flat = magnitude.reshape(-1)
            tensors[f"{module}.lora_magnitude_vector"] = flat[None, :, None, None] if up.ndim == 4 else flat
    return tensors


def write_lora(
    adapters: Mapping[str, LoraTensors],
    path: Path,
    names: LoraNames,
    style: str = KOHYA,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write adapters as .safetensors (with text `metadata`), or as another suffix says, see `write_weights`."""
    tensors = lora_tensors(adapters, names, style)
    safe = path.suffix == ".safetensors"
    write_weights(tensors, path, {"format": "pt", **(metadata or {})} if safe else None)
