"""The only writer of weights: a file appears under its name complete and verified, or not at all.

A temporary file beside the target is written, flushed to the disk, read back and renamed. Its writer holds a lock on it, which ends with
the process however that ends, so that whoever comes next can tell an abandoned temporary file from a live one.
"""

import contextlib
import enum
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor

from ldm.checkpoint.load import CheckpointError, read_checkpoint, verify_checkpoint

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, temporary files are told apart by their age
    fcntl = None

logger = logging.getLogger(__name__)

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
_STALE_HOURS = 24  # age at which a temporary file counts as abandoned where there are no locks


class CheckpointWriteError(CheckpointError, OSError):
    """A checkpoint that could not be written; what was there before is untouched."""


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's reader and writer of checkpoints: `Trainer(plugins=[AtomicCheckpointIO()])`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise TypeError("storage_options: checkpoints are written to local files, which take none")
        write_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """A checkpoint, read as data; `weights_only=False` is refused, for it would run whatever code the file names."""
        if weights_only is False:
            raise CheckpointError(f"{path}: weights_only=False is never used here: checkpoints are data")
        sweep_temporaries(Path(path).parent)
        return read_checkpoint(path, map_location=map_location or "cpu")

    def remove_checkpoint(self, path: str | os.PathLike) -> None:
        path = Path(path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------- writing


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write a checkpoint of tensors and plain Python values; numpy scalars, OmegaConf nodes and paths become plain on the way.

    Raises CheckpointError before anything is written where an entry is of another type, CheckpointWriteError where the disk refuses.
    """
    content = plain(checkpoint, "")
    _write_atomically(Path(path), lambda target: _torch_save(content, target), _size(content))


def write_weights(
    weights: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors alone: .safetensors (with text `metadata`) or, for any other ending, {"state_dict": ...} as .ckpt."""
    path = Path(path)
    if path.suffix != ".safetensors":
        if metadata:
            raise ValueError(f"{path}: only .safetensors files carry metadata")
        write_checkpoint({"state_dict": dict(weights)}, path)
        return
    from safetensors.torch import save_file

    apart = _without_shared_memory(weights)
    _write_atomically(path, lambda target: save_file(apart, target, metadata=dict(metadata or {})), _size(apart))


def _torch_save(content: Any, target: Path) -> None:
    with open(target, "wb") as file:  # a Python file, whose errors keep their number; torch's own writer loses it
        torch.save(content, file)


def _without_shared_memory(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors stores no views: a tensor that shares memory with an earlier one, or is not contiguous, is copied."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        own = _own_memory(tensor.detach())
        if own.untyped_storage().data_ptr() in seen or not own.is_contiguous():
            own = own.clone(memory_format=torch.contiguous_format)
        seen.add(own.untyped_storage().data_ptr())
        apart[name] = own
    return apart


def _write_atomically(path: Path, write: Callable[[Path], None], size: int) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder is in the way of the file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(path.parent)
        with _temporary_beside(path) as temporary:
            write(temporary)
            _sync(temporary)
            verify_checkpoint(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
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
def _temporary_beside(path: Path) -> Iterator[Path]:
    """An empty, locked file in the folder of `path`, gone at the end unless it was renamed."""
    temporary = path.parent / f".{path.name[:120]}.{uuid.uuid4().hex[:12]}.tmp"
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    try:
        if fcntl is None:
            os.close(handle)  # an open file cannot be renamed there
        else:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield temporary
    finally:
        if fcntl is not None:
            os.close(handle)
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep_temporaries(folder: str | os.PathLike) -> int:
    """Delete the temporary files that killed writers left in `folder` -> how many; those of living writers stay."""
    swept = 0
    for temporary in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError):  # another process may sweep or finish it at the same time
            if _abandoned(temporary):
                temporary.unlink()
                swept += 1
    if swept:
        logger.info("removed %d unfinished temporary file(s) from %s", swept, folder)
    return swept


def _abandoned(temporary: Path) -> bool:
    if fcntl is None:
        import time

        return time.time() - temporary.stat().st_mtime > _STALE_HOURS * 3600
    handle = os.open(temporary, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def plain(value: Any, where: str) -> Any:
    """`value` as tensors and plain Python values; CheckpointError names the entry that has no plain form."""
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
    if isinstance(value, list):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return {plain(item, where) for item in value}
    return _plain_leaf(value, where)


def _own_memory(tensor: Tensor) -> Tensor:
    """A copy of what is a view of larger memory (torch would save all of it) or empty (its address may be a neighbor's)."""
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_meta:
        return tensor
    whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    return tensor if whole and tensor.numel() else tensor.clone()


def _plain_leaf(value: Any, where: str) -> Any:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if kind == "omegaconf.listconfig.ListConfig":
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if type(value).__module__.split(".")[0] == "numpy":
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            return plain(value.item(), where)
        if hasattr(value, "dtype"):
            return torch.from_numpy(value.copy())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for base in (bool, int, float, str, bytes):
        if isinstance(value, base):  # subclasses, such as torch's version string
            return base(value)
    raise CheckpointError(
        f"checkpoint{where} is a {kind}: a checkpoint holds tensors, numbers, text, lists and dictionaries alone"
    )


def _size(value: Any) -> int:
    """About how many bytes the tensors in `value` take."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


# ---------------------------------------------------------------------------------------------------------------- finding


def find_checkpoint(run_folder: str | os.PathLike) -> Path:
    """The checkpoint that a run resumes from: `checkpoints/last.ckpt`, or the newest of the others where that is missing or damaged.

    run_folder: a run's folder, or its checkpoints folder. `crash.ckpt`, the state at an error, is taken only by its name.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    files = [*folder.glob("*.ckpt"), *folder.glob("*/*.ckpt")]  # checkpoints/trainstep_checkpoints/ too
    others = [path for path in files if path.name not in ("last.ckpt", "crash.ckpt") and not path.name.startswith(".")]
    candidates = [folder / "last.ckpt", *sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)]
    damaged: list[str] = []
    for path in candidates:
        if not path.is_file():
            continue
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        if damaged:
            logger.warning("resuming from %s, because %s", path, "; ".join(damaged))
        return path
    raise CheckpointError(
        f"{folder}: no usable checkpoint" + (f": {'; '.join(damaged)}" if damaged else " (no .ckpt file is there)")
    )
