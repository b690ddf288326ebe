"""The only writer of weights: a file appears under its name complete and verified, or not at all.

A temporary file next to the target is written, flushed to disk, read back and renamed. Its writer holds a lock, which
ends with the process, so that a later writer can tell abandoned temporary files from live ones.
"""

import contextlib
import enum
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import ListConfig
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint.formats import CheckpointError, verify_checkpoint

if sys.platform != "win32":  # without advisory locks, temporary files count as abandoned by their age
    import fcntl

logger = logging.getLogger(__name__)

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
_STALE_HOURS = 24


class CheckpointWriteError(CheckpointError, OSError):
    """A checkpoint could not be written; a previous file of that name is unchanged."""


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write tensors and plain Python values; numpy scalars, OmegaConf nodes and paths are converted to plain values.

    Raises CheckpointError for an entry of another type (nothing is written), CheckpointWriteError if writing fails.
    """
    content = plain(checkpoint, "")
    _write_atomically(Path(path), lambda target: _torch_save(content, target), _size(content))


def write_weights(
    weights: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors only: .safetensors (with text `metadata`) or, for another suffix, {"state_dict": ...} as .ckpt."""
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors = _without_shared_memory(weights)
        _write_atomically(path, lambda target: save_file(tensors, target, dict(metadata or {})), _size(tensors))
    elif metadata:
        raise ValueError(f"{path}: only .safetensors files can hold metadata")
    else:
        write_checkpoint({"state_dict": dict(weights)}, path)


def _torch_save(content: Any, target: Path) -> None:
    with open(target, "wb") as file:  # errors of a Python file keep their errno; torch's own writer loses it
        torch.save(content, file)


def _without_shared_memory(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory with an earlier one or are not contiguous: safetensors stores no views."""
    seen: set[int] = set()
    copied: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        own = _own_memory(tensor.detach())
        if own.untyped_storage().data_ptr() in seen or not own.is_contiguous():
            own = own.clone(memory_format=torch.contiguous_format)
        seen.add(own.untyped_storage().data_ptr())
        copied[name] = own
    return copied


# ------------------------------------------------------------------------------------------------------ atomic writing


def _write_atomically(path: Path, write: Callable[[Path], None], size: int) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path}: cannot write a file here: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(path.parent)
        with temporary_next_to(path) as temporary:
            write(temporary)
            sync(temporary)
            verify_checkpoint(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    except CheckpointWriteError:
        raise
    except (OSError, RuntimeError, CheckpointError) as error:
        raise _write_error(path, size, error) from error


def _write_error(path: Path, size: int, error: Exception) -> CheckpointWriteError:
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
    with contextlib.suppress(OSError):
        reason += f"; about {size:,} bytes are needed and {shutil.disk_usage(path.parent).free:,} free"
    kept = "the previous file is intact" if path.exists() else "nothing was left behind"
    failure = CheckpointWriteError(f"{path}: could not be written: {reason}; {kept}")
    failure.errno = getattr(error, "errno", None)
    return failure


@contextlib.contextmanager
def temporary_next_to(path: Path, folder: bool = False) -> Iterator[Path]:
    """An empty, locked file or folder next to `path`; deleted at the end unless it was renamed."""
    temporary = path.parent / f".{path.name[:120]}.{uuid.uuid4().hex[:12]}.tmp"
    temporary.mkdir() if folder else temporary.touch(exist_ok=False)
    try:
        with _locked(temporary):
            yield temporary
    finally:
        _delete(temporary)


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file or folder; without `wait`, BlockingIOError if another process holds it."""
    if sys.platform == "win32":  # an open file cannot be renamed there
        yield
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    if path.is_dir() and sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep_temporaries(folder: str | os.PathLike, pattern: str = ".*.tmp", folders: bool = False) -> int:
    """Delete the temporary files (or `folders`) that killed writers left in `folder`; return their number."""
    swept = 0
    for temporary in Path(folder).glob(pattern):
        with contextlib.suppress(OSError):  # another process may sweep or finish it at the same time, or hold its lock
            if temporary.is_dir() != folders or temporary.is_symlink():
                continue
            if sys.platform == "win32" and time.time() - temporary.stat().st_mtime < _STALE_HOURS * 3600:
                continue
            with _locked(temporary, wait=False):
                _delete(temporary)
                swept += 1
    if swept:
        logger.info("removed %d unfinished temporary file(s) from %s", swept, folder)
    return swept


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- plain values


def plain(value: Any, where: str) -> Any:
    """`value` as tensors and plain Python values; CheckpointError names an entry that has no plain form."""
    if isinstance(value, enum.Enum):
        return plain(value.value, where)
    if isinstance(value, Tensor):
        return _own_memory(value.detach())
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Mapping):  # OmegaConf's DictConfig too
        return {plain(key, where): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, list | ListConfig):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return {plain(item, where) for item in value}
    return _plain_leaf(value, where)


def _own_memory(tensor: Tensor) -> Tensor:
    """A copy of a view (torch would save all of its memory) or of an empty tensor (its address may be shared)."""
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_meta:
        return tensor
    whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    return tensor if whole and tensor.numel() else tensor.clone()


def _plain_leaf(value: Any, where: str) -> Any:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if type(value).__module__.split(".")[0] == "numpy":
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            return plain(value.item(), where)
        if hasattr(value, "dtype"):
            return torch.from_numpy(value.copy())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    base: Any
    for base in (int, float, str, bytes):
        if isinstance(value, base):  # subclasses, such as torch's version string
            return base(value)
    raise CheckpointError(
        f"checkpoint{where} is a {kind}; a checkpoint may hold only tensors, numbers, text, lists and dictionaries"
    )


def _size(value: Any) -> int:
    """Bytes of the tensors in `value`."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0
