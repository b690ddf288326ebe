"""The only reader of weights: .ckpt (zip and legacy), .safetensors, bare state_dicts, Lightning checkpoints; as data that never runs.

`read_weights` gives tensors under the published names, `load_weights` puts them into a module and reports, `read_checkpoint` gives a
whole Lightning checkpoint. Writing lives in `ldm.checkpoint_io`; its public names can be imported from here, and Lightning comes only then.
"""

import contextlib
import io
import logging
import os
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint_names import EMA, EXCUSES, published_names, start_ema, use_ema_weights

log = logging.getLogger(__name__)

_WRITERS = ("AtomicCheckpointIO", "CheckpointWriteError", "find_checkpoint", "sweep_temporaries", "write_checkpoint", "write_weights")
_LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled: files of torch < 1.6
_NOT_WEIGHTS = (  # (how a file begins that is no weights, what it is and what to do)
    (b"version https://git-lfs", "a git-lfs pointer, not the weights: run `git lfs pull` where it came from"),
    (b"<", "a web page, not the weights: the download failed or asked for a login"),
)


class CheckpointError(ValueError):
    """A weights file that cannot be used, in one line that names it."""


class UnsafeCheckpointError(CheckpointError):
    """A file that asks for code to be run on loading; `refused` is the dotted name that it asks for."""

    def __init__(self, path: str | os.PathLike, refused: str) -> None:
        self.refused = refused
        super().__init__(
            f"{path}: refused, because it names {refused}, which is code and no weight; get it as .safetensors from a source you trust"
        )


# ---------------------------------------------------------------------------------------------------------------- reading


def read_weights(path: str | os.PathLike, use_ema: bool = False) -> dict[str, Tensor]:
    """The tensors of a weights file under their published names, on the CPU and memory-mapped where the format allows.

    path: .ckpt or .safetensors (told apart by their content): a bare state_dict, or a checkpoint with a `state_dict` inside.
    use_ema: give the moving averages in the place of the trained weights; a file without averages is taken as it is, with a warning.
    """
    path = _existing_file(path)
    weights = published_names(_tensors(path))
    if not use_ema:
        return weights
    weights, taken = use_ema_weights(weights)
    if not taken:
        log.warning("%s: EMA weights were asked for and the file holds none beside its weights, which are used as they are", path)
    return weights


def read_checkpoint(path: str | os.PathLike, map_location: Any = "cpu", verify: bool = True) -> dict[str, Any]:
    """A whole Lightning checkpoint (weights, optimizers, loops), read as data; `verify` checks every byte's checksum first."""
    path = _existing_file(path)
    if verify:
        _check_archive(path)
    content = _torch_load(path, map_location=map_location, mmap=False)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint: it holds a {type(content).__name__}")
    return content


def verify_checkpoint(path: str | os.PathLike) -> None:
    """Raise CheckpointError unless the file reads as a whole: the checksums of a zip file, and every entry; its tensors stay on the disk."""
    path = _existing_file(path)
    with open(path, "rb") as file:
        start = file.read(16)
    if _is_safetensors(start, path.stat().st_size):
        _read_safetensors(path)
        return
    _check_archive(path)
    _torch_load(path, map_location="cpu", mmap=start.startswith(b"PK"))


def _check_archive(path: Path) -> None:
    """Raise CheckpointError where a zip file's records do not agree with their checksums; other formats carry none."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, struct.error, NotImplementedError) as error:
        raise CheckpointError(f"{path}: corrupt: {error}") from error
    if bad is not None:
        raise CheckpointError(f"{path}: corrupt: the checksum of {bad} is wrong")


def _existing_file(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder, where a .ckpt or .safetensors file is needed")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: empty (0 bytes): the download or the save did not finish")
    return path


def _tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file's state_dict, under the file's own names."""
    with open(path, "rb") as file:
        start = file.read(16)
    if _is_safetensors(start, path.stat().st_size):
        return _read_safetensors(path)
    content = _torch_load(path, map_location="cpu", mmap=start.startswith(b"PK"))
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, where a state_dict was expected")
    weights = {name: value.detach() for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not weights:
        raise CheckpointError(f"{path}: holds no tensors; its entries are {_some(map(str, content))}")
    return weights


def _is_safetensors(start: bytes, size: int) -> bool:
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a complete .safetensors file: {error}") from error


def _torch_load(path: Path, map_location: Any, mmap: bool) -> Any:
    """torch.load with weights_only, under stubs for what old Lightning files hold beside their weights. There is no other way in."""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start.startswith((b"PK\x03\x04", _LEGACY_START)):
        raise _no_weights(path, start)
    try:
        with torch.serialization.safe_globals(list(_STUBS)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # torch reports a damaged file by a dozen types, and every one of them means the same to the user
        if isinstance(error, pickle.UnpicklingError) and (refused := _refused_global(path, str(error))):
            raise UnsafeCheckpointError(path, refused) from error
        raise CheckpointError(f"{path}: cannot be read, it is truncated or corrupt ({_first_line(error)})") from error


def _no_weights(path: Path, start: bytes) -> CheckpointError:
    for beginning, meaning in _NOT_WEIGHTS:
        if start.lstrip().startswith(beginning):
            return CheckpointError(f"{path}: {meaning}")
    with open(path, "rb") as file:
        named = [name for name in _globals_of(file) if not _harmless(name)]
    if named:
        return UnsafeCheckpointError(path, named[0])
    return CheckpointError(f"{path}: neither a .ckpt nor a .safetensors file (it begins with {start[:8]!r})")


# ------------------------------------------------------------------------------------- what old files hold beside weights


class _Nothing:
    """Stands for a class that a checkpoint only mentions, as a dictionary key."""


_NUMPY_CODES = dict(zip("b1 i1 u1 i2 u2 i4 u4 i8 u8 f2 f4 f8".split(), "?bBhHiIqQefd"))  # numpy's name of a number -> struct's


class _NumpyType:
    """Stands for numpy.dtype: remembers the type's code, e.g. "f8", and its byte order."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]


def _numpy_scalar(kind: Any, raw: Any = b"") -> bool | int | float | None:
    """Stands for numpy's scalar constructor: the plain Python number, or None for what is no number."""
    code = _NUMPY_CODES.get(getattr(kind, "code", None))
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if code is None or not isinstance(raw, bytes) or len(raw) != struct.calcsize(f"<{code}"):
        return None
    return struct.unpack(kind.order + code, raw)[0]


_STUBS: tuple[tuple[Any, str], ...] = (
    (_Nothing, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_NumpyType, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
)


def _refused_global(path: Path, message: str) -> str | None:
    """The dotted name that the safe loader stopped at; None where the file is damaged rather than hostile."""
    if match := re.search(r"GLOBAL (\S+)", message):
        return match[1] if "." in match[1] else f"builtins.{match[1]}"
    return next((name for name in _globals_in(path) if not _harmless(name)), None)


def _harmless(name: str) -> bool:
    return name.startswith(("torch.", "collections.OrderedDict", "_codecs.encode")) or name in {stub for _, stub in _STUBS}


def _globals_in(path: Path) -> Iterator[str]:
    """Every dotted name in the file's pickles, found by reading their instructions without following any."""
    if zipfile.is_zipfile(path):
        with contextlib.suppress(zipfile.BadZipFile, OSError, KeyError, RuntimeError), zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                if entry.endswith(".pkl"):
                    yield from _globals_of(io.BytesIO(archive.read(entry)))
    else:
        with open(path, "rb") as file:
            yield from _globals_of(file)


def _globals_of(file: io.BufferedIOBase) -> Iterator[str]:
    strings: list[str] = []
    with contextlib.suppress(ValueError, EOFError, struct.error, MemoryError, OverflowError):
        while True:
            for operation, argument, _ in pickletools.genops(file):
                if isinstance(argument, str) and operation.name not in ("GLOBAL", "INST"):
                    strings.append(argument)
                if operation.name in ("GLOBAL", "INST"):
                    yield str(argument).replace(" ", ".")
                elif operation.name == "STACK_GLOBAL" and len(strings) > 1:
                    yield ".".join(strings[-2:])


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
                text += f", {len(names)} {what} ({_some(names)})"
        return text + (", EMA started from the weights" if self.ema_started else "")


def load_weights(
    module: nn.Module,
    path: str | os.PathLike,
    ignore_keys: Iterable[str] = (),
    only: str | None = None,
    strict_blocks: bool = True,
    use_ema: bool = False,
) -> LoadReport:
    """Load a weights file into `module` and report; log one line.

    ignore_keys: beginnings of names that are neither read from the file nor required by the module.
    only: a beginning of the module's names, e.g. "model.": nothing else is touched, and a file of that submodule alone will do as well.
    strict_blocks: a block (a child of the module or a child's child) that the file lacks as a whole is an error, unless a rule excuses it:
        EXCUSES in ldm.checkpoint_names; a submodule loaded from a file of its own; one that finds its weights itself (`ensure_weights`).
    use_ema: load the file's moving averages as the weights.
    Weights on the meta device are replaced by the file's (memory-mapped, in the module's dtype), others are overwritten in place.
    Raises CheckpointError when nothing matches, a shape differs or a block is missing.
    """
    path = Path(path)
    skip = (ignore_keys,) if isinstance(ignore_keys, str) else tuple(ignore_keys)
    wanted = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith(skip) and name.startswith(only or "")}
    weights = read_weights(path, use_ema)
    if only and not any(name.startswith(only) for name in weights):
        weights = {only + name: tensor for name, tensor in weights.items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(skip) and name.startswith(only or "")}
    ema_started = start_ema(weights, wanted)

    found = {name: tensor for name, tensor in weights.items() if name in wanted}
    if not found:
        raise CheckpointError(
            f"{path}: no weight fits {type(module).__name__}: the file has {_some(weights)}, the model {_some(wanted)}; "
            f"is this the config that the file belongs to?"
        )
    reshaped = [name for name, tensor in found.items() if tensor.shape != wanted[name].shape]
    if reshaped:
        shapes = "; ".join(f"{name}: {tuple(found[name].shape)}, the model's {tuple(wanted[name].shape)}" for name in reshaped[:3])
        raise CheckpointError(f"{path}: {len(reshaped)} tensors have other shapes: {shapes}; is this the config that the file belongs to?")

    missing = _missing(module, wanted, found)
    excused, gone = _absent_blocks(module, wanted, missing)
    if gone and strict_blocks:
        raise CheckpointError(
            f"{path}: lacks all weights of {', '.join(gone)}, which would stay at their random start; "
            f"use the file that belongs to this config, or name what may be missing in ignore_keys"
        )
    on_meta = any(tensor.is_meta for tensor in wanted.values())
    if on_meta:
        found = {name: tensor.to(wanted[name].dtype) for name, tensor in found.items()}
    module.load_state_dict(found, strict=False, assign=on_meta)
    module._weights_file = str(path)  # excuses this module where a later file for its parent lacks it

    unexpected = tuple(name for name in weights if name not in wanted and not name.startswith(EMA))
    report = LoadReport(path, len(found), missing, unexpected, excused, ema_started)
    log.log(logging.INFO if all(_has_excuse(module, name) for name in missing) else logging.WARNING, "%s", report)
    return report


def ensure_weights(module: nn.Module) -> None:
    """Let every encoder inside `module` that no file has given its weights find them (a local folder, then the hub), before first use."""
    for submodule in module.modules():
        if getattr(submodule, "finds_own_weights", False):
            submodule.ensure_weights()


def _missing(module: nn.Module, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names that the file lacks, without those that share their tensor with a loaded one (a first stage that is also the condition)."""
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    filled = {id(own[name]) for name in found if name in own}
    return tuple(name for name in wanted if name not in found and id(own.get(name)) not in filled and not name.endswith("position_ids"))


def _absent_blocks(module: nn.Module, wanted: Mapping[str, Tensor], missing: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
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
    """The blocks a name belongs to, largest first: "cond_stage_model.transformer.x.weight" -> cond_stage_model, cond_stage_model.transformer."""
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


def _some(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _first_line(error: Exception) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text[:200]


def __getattr__(name: str) -> Any:
    if name in _WRITERS:
        from ldm import checkpoint_io

        return getattr(checkpoint_io, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
