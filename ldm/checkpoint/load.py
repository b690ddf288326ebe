"""Loading of weights into modules: read, rename, choose EMA, match, check shapes and blocks, assign, report."""

import contextlib
import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from ldm.checkpoint.formats import CheckpointError, preview
from ldm.checkpoint.mapped import mapped_files, release
from ldm.checkpoint.names import EMA, LORA, OPTIONAL_KEYS, TOKENS, published_name, start_ema, use_ema_weights
from ldm.checkpoint.source import WeightsSource, open_weights

logger = logging.getLogger(__name__)

_LOADED: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that `load_weights` filled


_SHAPE_SETTINGS = (  # (end of a name, dimension, setting that determines it)
    ("diffusion_model.input_blocks.0.0.weight", 0, "unet_config.params.model_channels"),
    ("diffusion_model.input_blocks.0.0.weight", 1, "unet_config.params.in_channels"),
    ("diffusion_model.out.2.weight", 0, "unet_config.params.out_channels"),
    ("attn2.to_k.weight", 1, "unet_config.params.context_dim"),
    ("encoder.conv_in.weight", 0, "ddconfig.ch"),
    ("encoder.conv_in.weight", 1, "ddconfig.in_channels"),
    ("decoder.conv_in.weight", 1, "ddconfig.z_channels"),
    ("decoder.conv_out.weight", 0, "ddconfig.out_ch"),
    ("post_quant_conv.weight", 1, "embed_dim"),
    ("quantize.embedding.weight", 0, "n_embed"),
    ("cond_stage_model.embedding.weight", 0, "cond_stage_config.params.n_classes"),
    ("alphas_cumprod", 0, "timesteps"),
)


_CASTING_THREADS = 2  # memory is the limit, and page faults, which more threads do not share

_LOSS = "loss."  # begins the tensors of a first stage's loss


@dataclass(frozen=True)
class LoadReport:
    """Result of `load_weights`. Names are the published ones, in the module's order."""

    path: Path
    loaded: int  # tensors of the module that were loaded
    missing: tuple[str, ...]  # names of the module that the file lacks, optional ones included
    unexpected: tuple[str, ...]  # names of the file that the module lacks, without those of a loss if it has none
    excused: tuple[str, ...]  # blocks that may be missing as a whole and are: "cond_stage_model", "loss", ...
    ema_started: bool  # the averages were started from the weights, because the file has none

    def __str__(self) -> str:
        text = f"loaded {self.loaded} tensors from {self.path}"
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                text += f", {len(names)} {what} ({preview(names)})"
        return text + (", EMA started from the weights" if self.ema_started else "")


def read_weights(
    source: str | os.PathLike | WeightsSource, use_ema: bool = False, wanted: Iterable[str] = ()
) -> dict[str, Tensor]:
    """The tensors of a file, an index of shards or a diffusers folder under their published names, on the CPU.

    They are memory-mapped where the format allows.
    use_ema: averages in place of the trained weights; a file without averages gives its weights, with a warning.
    wanted: names of the target model, needed to name the averages of a file that holds nothing else.
    """
    source = open_weights(source)
    weights = source.tensors()
    return _choose_ema(source, weights, wanted) if use_ema else weights


def read_step(source: str | os.PathLike | WeightsSource) -> int | None:
    """The optimizer step at which Lightning wrote a checkpoint; None for weights only."""
    return open_weights(source).step()


def load_weights(
    module: nn.Module,
    source: str | os.PathLike | WeightsSource,
    ignore_keys: Iterable[str] = (),
    only: str | None = None,
    strict_blocks: bool = True,
    use_ema: bool = False,
    weights: Mapping[str, Tensor] | None = None,
) -> LoadReport:
    """Load weights into `module` and report; log one line.

    ignore_keys: prefixes of names that are neither read nor required.
    only: prefix of the module's names, e.g. "model.": nothing else is changed. The file may hold that submodule alone.
    strict_blocks: raise if a whole block (a child or grandchild of the module) is missing, unless it is optional
        (OPTIONAL_KEYS), was loaded from another file, or finds its weights itself (`ensure_weights`).
    use_ema: load the averages as the weights.
    weights: the source's tensors, if already read.
    Parameters on the meta device are replaced by the file's tensors (memory-mapped, in the parameter's dtype and
    layout); others are overwritten in place. Noise schedule tables in half precision are skipped (`_rounded_tables`).
    Raises CheckpointError if nothing matches, a shape differs, a block is missing or adapters are left over; then the
    module is unchanged.
    """
    source = open_weights(source)
    skip = (ignore_keys,) if isinstance(ignore_keys, str) else tuple(ignore_keys)
    state = module.state_dict()
    names = ((name, own) for own in state if (name := published_name(own)) is not None)
    own_names = {name: own for name, own in names if name.startswith(only or "") and not name.startswith(skip)}
    wanted = {name: state[own] for name, own in own_names.items()}
    given = source.tensors() if weights is None else weights
    if use_ema:
        given = _choose_ema(source, given, wanted)
    given = _select(given, only or "", skip)
    ema_started = start_ema(given, wanted)
    for name in _rounded_tables(module, own_names, given):
        del given[name], wanted[name], own_names[name]
    found = _match(source.path, module, given, wanted)
    _check_shapes(source.path, found, wanted)
    missing = _missing(module, own_names, found)
    optional = {name for name in missing if _is_optional(module, name)}
    excused = _check_blocks(source.path, wanted, missing, optional, strict_blocks)
    unexpected = tuple(name for name in given if name not in wanted and not name.startswith(EMA))
    if not any(name.startswith(_LOSS) for name in wanted):  # a module that does not train needs no weights of a loss
        unexpected = tuple(name for name in unexpected if not name.startswith(_LOSS))
    refuse_adapters(source.path, unexpected)
    _assign(module, {own_names[name]: (tensor, wanted[name]) for name, tensor in found.items()})
    report = LoadReport(source.path, len(found), missing, unexpected, excused, ema_started)
    logger.log(logging.INFO if optional.issuperset(missing) else logging.WARNING, "%s", report)
    return report


@runtime_checkable
class _PretrainedEncoder(Protocol):
    finds_own_weights: bool
    has_weights: bool

    def ensure_weights(self) -> None: ...


def ensure_weights(module: nn.Module) -> None:
    """Let every encoder inside `module` that no file has filled find its weights (a local folder, then the hub)."""
    for encoder in module.modules():
        if isinstance(encoder, _PretrainedEncoder) and (encoder.finds_own_weights or encoder.has_weights):
            encoder.ensure_weights()


class _NoInitialization(TorchFunctionMode):
    """Leave tensors without data as they are: torch would import its compiler, for seconds, to "fill" them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.normal_ or getattr(func, "__module__", None) == nn.init.__name__:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextlib.contextmanager
def weights_on_meta() -> Iterator[None]:
    """Create parameters on the meta device, without memory and initialization; buffers are real."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # the stub forbids a result
    try:
        with _NoInitialization():
            yield
    finally:
        hook.remove()


def refuse_adapters(path: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError if adapters of a run are among the names of a file that are not used."""
    lost = [name for name in names if name.startswith((LORA, TOKENS))]
    if lost:
        raise CheckpointError(
            f"{path}: {len(lost)} tensors are adapters ({preview(lost)}) and would be lost: use the config of their "
            "run, or its base weights, into which scripts/merge_lora.py merges a LoRA"
        )


# ------------------------------------------------------------------------------------------------ steps of load_weights


def _choose_ema(source: WeightsSource, weights: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    chosen, taken = use_ema_weights(weights, wanted)
    if not chosen:
        raise CheckpointError(f"{source.path}: holds only EMA weights, and none of them belongs to this model")
    if not taken and not source.averaged:
        logger.warning("%s: no EMA weights in the file; using the regular weights", source.path)
    return chosen


def _select(weights: Mapping[str, Tensor], prefix: str, skip: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights under `prefix`, which a file of that submodule alone does not have in its names."""
    if prefix and not any(name.startswith(prefix) for name in weights):
        weights = {prefix + name: tensor for name, tensor in weights.items()}
    return {name: t for name, t in weights.items() if name.startswith(prefix) and not name.startswith(skip)}


def _rounded_tables(module: nn.Module, own_names: Mapping[str, str], weights: Mapping[str, Tensor]) -> list[str]:
    """Names of noise schedule tables that the file holds in half precision.

    There the first alphas_cumprod are 1, and samplers divide by 1 - alphas_cumprod. The module computed them in float32
    from the config.
    """
    tables = set()
    for prefix, process in module.named_modules():
        shape = (getattr(process, "num_timesteps", None),)  # (T,)
        buffers = process.named_buffers(prefix, recurse=False)
        tables |= {name for name, buffer in buffers if buffer.shape == shape and not buffer.is_meta}
    return [name for name, own in own_names.items() if own in tables and name in weights and weights[name].itemsize < 4]


def _match(
    path: Path, module: nn.Module, weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights that the module has; CheckpointError if there are none."""
    found = {name: tensor for name, tensor in weights.items() if name in wanted}
    if weights and all(name.startswith(EMA) for name in weights) and not all(name.startswith(EMA) for name in wanted):
        raise CheckpointError(f"{path}: holds only EMA weights (model_ema.*): load them with --use_ema or use_ema=True")
    if not found:
        advice = "does this config match the checkpoint?"
        if any(".lora_" in name or ".lora." in name for name in weights):
            advice = "this is a LoRA: pass it with --lora, and its base with --ckpt"
        elif not any("." in name for name in weights):
            advice = "an embedding is passed with --embedding, and its model with --ckpt"
        raise CheckpointError(
            f"{path}: no weight matches {type(module).__name__}: the file has {preview(weights)}, the model "
            f"{preview(wanted)}; {advice}"
        )
    return found


def _check_shapes(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    differing = [name for name, tensor in found.items() if tensor.shape != wanted[name].shape]
    if differing:
        shapes = "; ".join(
            f"{name}: {tuple(found[name].shape)}, the model's {tuple(wanted[name].shape)}" for name in differing[:3]
        )
        advice = advise_settings({name: (tuple(found[name].shape), tuple(wanted[name].shape)) for name in differing})
        advice = advice or "does this config match the checkpoint?"
        raise CheckpointError(f"{path}: {len(differing)} tensors have other shapes: {shapes}; {advice}")


def advise_settings(shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> str:
    """Return the settings that fit a model to a file, from {name: (shape in the file, shape in the model)}."""
    needed: dict[str, int] = {}
    for ending, dimension, setting in _SHAPE_SETTINGS:
        for name, (before, now) in shapes.items():
            if name.endswith(ending) and len(before) == len(now) > dimension and before[dimension] != now[dimension]:
                needed.setdefault(setting, before[dimension])
    return f"the file needs {', '.join(f'{name}={value}' for name, value in needed.items())}" if needed else ""


def _missing(module: nn.Module, own_names: Mapping[str, str], found: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names that the file lacks, except aliases of a loaded tensor (a first stage that is also the condition stage)."""
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    loaded = {id(own[own_names[name]]) for name in found if own_names[name] in own}
    return tuple(name for name in own_names if name not in found and id(own.get(own_names[name])) not in loaded)


def _is_optional(module: nn.Module, name: str) -> bool:
    """True if a rule lets the name be missing, or if a module around it has or finds its weights elsewhere."""
    if any(pattern.search(name) for pattern in OPTIONAL_KEYS):
        return True
    owner: object = module
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part, None)
        if isinstance(owner, nn.Module) and (owner in _LOADED or getattr(owner, "finds_own_weights", False)):
            return True
    return False


def _check_blocks(
    path: Path, wanted: Iterable[str], missing: Iterable[str], optional: set[str], strict: bool
) -> tuple[str, ...]:
    """The optional blocks of which the file holds nothing; CheckpointError for other blocks if `strict`."""
    present = {block for name in set(wanted).difference(missing) for block in _blocks(name)}
    excused: dict[str, None] = {}
    absent: dict[str, None] = {}
    for name in missing:
        block = next((block for block in _blocks(name) if block not in present), None)
        if name in optional:
            excused[block or name] = None
        elif block is not None:
            absent[block] = None
    if absent and strict:
        raise CheckpointError(
            f"{path}: lacks all weights of {', '.join(absent)}, which would keep their random initialization; "
            f"use the checkpoint of this config, or list what may be missing in ignore_keys"
        )
    return tuple(excused)


def _blocks(name: str) -> tuple[str, ...]:
    """The child and grandchild that hold a name: "model.diffusion_model.x.weight" -> model, model.diffusion_model."""
    parts = name.split(".")[:-1]
    return tuple(".".join(parts[:depth]) for depth in range(1, min(len(parts), 2) + 1))


def _assign(module: nn.Module, found: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Load {own name: (tensor of the file, tensor of the module)}."""
    on_meta = any(wanted.is_meta for _, wanted in found.values())
    state = {name: tensor for name, (tensor, _) in found.items()}
    if on_meta:
        files = mapped_files()
        with ThreadPoolExecutor(_CASTING_THREADS) as pool:  # torch casts without holding Python's lock
            cast = pool.map(lambda pair: _shaped_like(pair[0], pair[1], files), found.values())
            state = dict(zip(found, cast, strict=True))
    module.load_state_dict(state, strict=False, assign=on_meta)
    _LOADED.add(module)


def _shaped_like(tensor: Tensor, wanted: Tensor, files: Sequence[range]) -> Tensor:
    """`tensor` in the dtype and memory format of `wanted`; itself, still memory-mapped, if it has them.

    files: those whose pages are released once they are cast, so that no weight is in memory twice.
    """
    last = wanted.ndim == 4 and not wanted.is_contiguous()
    cast = tensor.to(wanted.dtype, memory_format=torch.channels_last if last else torch.preserve_format)
    if cast is not tensor:
        release(tensor, files)
    return cast
