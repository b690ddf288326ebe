"""The only writer of weights: a file appears under its name complete and verified, or not at all (`ldm.atomic`)."""

import enum
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import ListConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import Buffer

from ldm.atomic import WriteError, atomic_file
from ldm.checkpoint.formats import SPLIT_ENTRIES, CheckpointError, map_tensors, verify_file

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


class CheckpointWriteError(CheckpointError, WriteError):
    """A checkpoint could not be written; a previous file of that name is unchanged."""


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write tensors and plain Python values; numpy scalars, OmegaConf nodes and paths are converted to plain values.

    Raises CheckpointError for an entry of another type (nothing is written), CheckpointWriteError if writing fails.
    """
    content = plain(checkpoint, "")
    _write(Path(path), lambda target: _torch_save(content, target), _size(content))


def write_weights(
    weights: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors only: .safetensors (with text `metadata`) or, for another suffix, {"state_dict": ...} as .ckpt."""
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors = _without_shared_memory(weights)
        # A killed save_file leaves a temporary file of a random name.
        _write(path, lambda target: save_file(tensors, target, dict(metadata or {})), _size(tensors), in_folder=True)
    elif metadata:
        raise ValueError(f"{path}: only .safetensors files can hold metadata")
    else:
        write_checkpoint({"state_dict": dict(weights)}, path)


def split_tensors(
    checkpoint: Mapping[str, Any], own: Callable[[Tensor], Tensor | None]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> (the tensors of this rank's part by their places, the index), see `ldm.checkpoint.formats`.

    own: the rows of a tensor that this rank writes; None if it writes none.
    """
    part: dict[str, Tensor] = {}

    def take(place: str, tensor: Tensor) -> Tensor:
        rows = own(tensor.detach())
        if rows is not None:
            part[place] = rows
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    split = {key: map_tensors(take, checkpoint[key], f"[{key!r}]") for key in SPLIT_ENTRIES if key in checkpoint}
    return part, {**checkpoint, **split}


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


def _write(path: Path, write: Callable[[Path], None], size: int, in_folder: bool = False) -> None:
    try:
        with atomic_file(path, size, in_folder=in_folder) as temporary:
            try:
                write(temporary)
                if in_folder:  # safetensors creates files that only their owner may read
                    temporary.chmod(temporary.parent.stat().st_mode & 0o666)
                verify_file(temporary)
            except (CheckpointError, SafetensorError) as error:
                raise OSError(str(error)) from error
    except WriteError as error:
        failure = CheckpointWriteError(str(error))
        failure.errno = error.errno
        raise failure from error


class _RecordingFile(io.FileIO):
    """A file that keeps its first error, which torch's writer replaces by an internal assertion."""

    error: OSError | None = None

    def write(self, data: Buffer) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            raise


def _torch_save(content: Any, target: Path) -> None:
    raw = _RecordingFile(target, "w")
    try:
        with io.BufferedWriter(raw) as file:
            torch.save(content, file)
    except RuntimeError as error:
        raise (raw.error or error) from error


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
