"""The only reader of weights: .ckpt (zip, legacy, Lightning's), .safetensors, shards, diffusers folders; as data that never runs.

`read_weights` gives tensors under the published names, `load_weights` puts them into a module and reports, `read_checkpoint` gives a
whole Lightning checkpoint. Writing lives in `ldm.checkpoint.write`; its public names can be imported from here, and Lightning comes only then.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.formats import (
    CheckpointError,
    UnsafeCheckpointError,
    check_archive,
    existing_file,
    load_pickle,
    read_shards,
    read_tensors,
    some,
    verify_checkpoint,
)
from ldm.checkpoint.names import EMA, EXCUSES, published_name, published_names, start_ema, use_ema_weights

__all__ = [
    "CheckpointError",
    "LoadReport",
    "UnsafeCheckpointError",
    "ensure_weights",
    "load_weights",
    "read_checkpoint",
    "read_step",
    "read_weights",
    "verify_checkpoint",
]
_WRITERS = (
    "AtomicCheckpointIO",
    "CheckpointWriteError",
    "find_checkpoint",
    "sweep_temporaries",
    "write_checkpoint",
    "write_weights",
)

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------------- reading


def read_weights(path: str | os.PathLike, use_ema: bool = False, wanted: Iterable[str] = ()) -> dict[str, Tensor]:
    """The tensors of a weights file under their published names, on the CPU and memory-mapped where the format allows.

    path: .ckpt or .safetensors (told apart by their content): a bare state_dict, or a checkpoint with a `state_dict` inside; an index of
        shards (`*.index.json`); or a diffusers folder: a pipeline's, or that of one UNet or first stage.
    use_ema: give the moving averages in the place of the trained weights; a file without averages is taken as it is, with a warning.
    wanted: names of the model that the weights are for, without which the averages of a file of averages alone have no names.
    """
    weights = published_names(_read_any(Path(path)))
    return _averages(Path(path), weights, wanted) if use_ema else weights


def _averages(path: Path, weights: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    chosen, taken = use_ema_weights(weights, wanted)
    if not chosen:
        raise CheckpointError(f"{path}: holds averaged weights alone, and none of them is a weight of this model")
    if not taken and not path.is_dir():  # a folder has one set of weights
        logger.warning(
            "%s: EMA weights were asked for and the file holds none beside its weights, which are used as they are",
            path,
        )
    return chosen


def _read_any(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        from ldm.checkpoint.diffusers.read import read_folder
        from ldm.checkpoint.diffusers.rules import InterchangeError

        try:
            return read_folder(path)
        except InterchangeError as error:
            raise CheckpointError(str(error)) from error
    return read_shards(path) if path.name.endswith(".index.json") else read_tensors(existing_file(path))


def read_checkpoint(path: str | os.PathLike, map_location: Any = "cpu", verify: bool = True) -> dict[str, Any]:
    """A whole Lightning checkpoint (weights, optimizers, loops), read as data; `verify` checks every byte's checksum first."""
    path = existing_file(path)
    if verify:
        check_archive(path)
    content = load_pickle(path, map_location=map_location, mmap=False)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint: it holds a {type(content).__name__}")
    return content


def read_step(path: str | os.PathLike) -> int | None:
    """The optimizer step at which a Lightning checkpoint was written; None for a file that holds weights alone."""
    if Path(path).is_dir():
        return None
    path = existing_file(path)
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    content = load_pickle(path, map_location="cpu", mmap=True) if zipped else None
    step = content.get("global_step") if isinstance(content, Mapping) else None
    return step if isinstance(step, int) else None


# ------------------------------------------------------------------------------------------------------ into a module


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did. Names are the module's own, in its order."""

    path: Path
    loaded: int  # tensors of the module that the file filled
    missing: tuple[str, ...]  # names of the module that the file lacks, excused ones included
    unexpected: tuple[str, ...]  # names of the file that the module lacks
    excused: tuple[str, ...]  # blocks that are missing as a whole, with a reason: "cond_stage_model", "loss", ...
    ema_started: bool  # the moving averages were filled from the weights, because the file holds none

    def __str__(self) -> str:
        text = f"loaded {self.loaded} tensors from {self.path}"
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                text += f", {len(names)} {what} ({some(names)})"
        return text + (", EMA started from the weights" if self.ema_started else "")


def load_weights(
    module: nn.Module,
    path: str | os.PathLike,
    ignore_keys: Iterable[str] = (),
    only: str | None = None,
    strict_blocks: bool = True,
    use_ema: bool = False,
    weights: Mapping[str, Tensor] | None = None,
) -> LoadReport:
    """Load a weights file into `module` and report; log one line.

    ignore_keys: beginnings of names that are neither read from the file nor required by the module.
    only: a beginning of the module's names, e.g. "model.": nothing else is touched, and a file of that submodule alone will do as well.
    strict_blocks: a block (a child of the module or a child's child) that the file lacks as a whole is an error, unless a rule excuses it:
        EXCUSES in ldm.checkpoint.names; a submodule loaded from a file of its own; one that finds its weights itself (`ensure_weights`).
    use_ema: load the file's moving averages as the weights.
    weights: what `read_weights(path)` gave, where a caller has read the file already.
    Weights on the meta device are replaced by the file's (memory-mapped, in their dtype and layout), others are overwritten in place.
    Tables of a noise schedule that the file holds in half precision are left as the module computed them (`_rounded_tables`).
    Raises CheckpointError when nothing matches, a shape differs or a block is missing.
    """
    path = Path(path)
    skip = (ignore_keys,) if isinstance(ignore_keys, str) else tuple(ignore_keys)
    state = module.state_dict()
    own_name = {
        name: own
        for own in state
        if (name := published_name(own)) and name.startswith(only or "") and not name.startswith(skip)
    }
    wanted = {name: state[own] for name, own in own_name.items()}
    weights = read_weights(path) if weights is None else dict(weights)
    weights = _averages(path, weights, wanted) if use_ema else weights
    if only and not any(name.startswith(only) for name in weights):
        weights = {only + name: tensor for name, tensor in weights.items()}
    weights = {
        name: tensor for name, tensor in weights.items() if not name.startswith(skip) and name.startswith(only or "")
    }
    ema_started = start_ema(weights, wanted)
    for name in _rounded_tables(module, own_name, weights):
        del weights[name], wanted[name], own_name[name]

    found = {name: tensor for name, tensor in weights.items() if name in wanted}
    if weights and all(name.startswith(EMA) for name in weights) and not all(name.startswith(EMA) for name in wanted):
        raise CheckpointError(
            f"{path}: holds averaged weights alone (model_ema.*): ask for them, with --use_ema or use_ema=True"
        )
    if not found:
        raise CheckpointError(
            f"{path}: no weight fits {type(module).__name__}: the file has {some(weights)}, the model {some(wanted)}; "
            f"is this the config that the file belongs to?"
        )
    reshaped = [name for name, tensor in found.items() if tensor.shape != wanted[name].shape]
    if reshaped:
        shapes = "; ".join(
            f"{name}: {tuple(found[name].shape)}, the model's {tuple(wanted[name].shape)}" for name in reshaped[:3]
        )
        raise CheckpointError(
            f"{path}: {len(reshaped)} tensors have other shapes: {shapes}; is this the config that the file belongs to?"
        )

    missing = _missing(module, own_name, found)
    excused, gone = _absent_blocks(module, wanted, missing)
    if gone and strict_blocks:
        raise CheckpointError(
            f"{path}: lacks all weights of {', '.join(gone)}, which would stay at their random start; "
            f"use the file that belongs to this config, or name what may be missing in ignore_keys"
        )
    on_meta = any(tensor.is_meta for tensor in wanted.values())
    if on_meta:
        found = {name: _shaped_like(tensor, wanted[name]) for name, tensor in found.items()}
    module.load_state_dict({own_name[name]: tensor for name, tensor in found.items()}, strict=False, assign=on_meta)
    module._weights_file = str(path)  # excuses this module where a later file for its parent lacks it

    unexpected = tuple(name for name in weights if name not in wanted and not name.startswith(EMA))
    report = LoadReport(path, len(found), missing, unexpected, excused, ema_started)
    logger.log(logging.INFO if all(_has_excuse(module, name) for name in missing) else logging.WARNING, "%s", report)
    return report


def _shaped_like(tensor: Tensor, wanted: Tensor) -> Tensor:
    """`tensor` in the dtype of `wanted` and with its channels innermost where they are; itself, still in its file, where it is so."""
    if wanted.ndim == 4 and not wanted.is_contiguous():
        return tensor.to(wanted.dtype, memory_format=torch.channels_last)
    return tensor.to(wanted.dtype)


def ensure_weights(module: nn.Module) -> None:
    """Let every encoder inside `module` that no file has given its weights find them (a local folder, then the hub), before first use."""
    for submodule in module.modules():
        if getattr(submodule, "finds_own_weights", False):
            submodule.ensure_weights()


def _rounded_tables(module: nn.Module, own_name: Mapping[str, str], weights: Mapping[str, Tensor]) -> list[str]:
    """Tables of the noise schedule that a half-precision file holds: there the first alphas_cumprod are 1, which divides by zero.

    They follow from the config, so that the module's own float32 ones are right.
    """
    tables = set()
    for prefix, process in module.named_modules():
        shape = (getattr(process, "num_timesteps", None),)  # (T,)
        tables |= {
            name
            for name, buffer in process.named_buffers(prefix, recurse=False)
            if buffer.shape == shape and not buffer.is_meta
        }
    return [name for name in own_name if own_name[name] in tables and name in weights and weights[name].itemsize < 4]


def _missing(module: nn.Module, own_name: Mapping[str, str], found: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names that the file lacks, without those that share their tensor with a loaded one (a first stage that is also the condition)."""
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    filled = {id(own[own_name[name]]) for name in found if own_name[name] in own}
    return tuple(name for name in own_name if name not in found and id(own.get(own_name[name])) not in filled)


def _absent_blocks(
    module: nn.Module, wanted: Mapping[str, Tensor], missing: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Blocks of which the file holds nothing -> (those with an excuse, those without one)."""
    absent = set(missing)
    present = {block for name in wanted if name not in absent for block in _blocks(name)}
    excused: dict[str, None] = {}
    gone: dict[str, None] = {}
    for name in missing:
        block = next((block for block in _blocks(name) if block not in present), None)
        if _has_excuse(module, name):
            excused[block or name] = None
        elif block is not None:
            gone[block] = None
    return tuple(excused), tuple(gone)


def _blocks(name: str) -> tuple[str, ...]:
    """The blocks a name belongs to, largest first: "first_stage_model.encoder.x.weight" -> first_stage_model, first_stage_model.encoder."""
    parts = name.split(".")[:-1]
    return tuple(".".join(parts[:depth]) for depth in range(1, min(len(parts), 2) + 1))


def _has_excuse(module: nn.Module, name: str) -> bool:
    if any(rule.pattern.search(name) for rule in EXCUSES):
        return True
    owner: Any = module
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part, None)
        if getattr(owner, "_weights_file", None) or getattr(owner, "finds_own_weights", False):
            return True
    return False


def __getattr__(name: str) -> Any:
    """The writers, imported with Lightning when they are first asked for."""
    if name in _WRITERS:
        from ldm.checkpoint import write as checkpoint_io

        return getattr(checkpoint_io, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
