"""A folder that appears under its name complete and read back, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.interchange.rules import InterchangeError

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:                                                         # Windows: what a killed writer left stays there
    fcntl = None


def check_target(target: Path) -> None:
    """InterchangeError where something is in the way."""
    if target.exists() or target.is_symlink():
        raise InterchangeError(f"--out {target}: is there already; name another, or remove it first")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into, which takes that name at the end; whatever goes wrong, nothing is left of it.

    What killed writers left beside this target is removed; those still alive hold a lock.
    """
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    temporary = target.parent / f".{target.name[:120]}.{uuid.uuid4().hex[:12]}.tmp"
    temporary.mkdir()
    handle = os.open(temporary, os.O_RDONLY) if fcntl else None
    try:
        if handle is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        check_target(target)
        temporary.rename(target)
        _sync(target.parent)
    except OSError as error:
        free = shutil.disk_usage(target.parent).free
        raise InterchangeError(f"--out {target}: could not be written: {error.strerror or error} ({free:,} bytes free)") from error
    finally:
        if handle is not None:
            os.close(handle)
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(target: Path) -> None:
    for left in target.parent.glob(f".{glob_escape(target.name[:120])}.*.tmp"):
        if fcntl is None or not left.is_dir() or left.is_symlink():
            continue
        handle = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(handle)


def glob_escape(name: str) -> str:
    import glob

    return glob.escape(name)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a .safetensors file and read it back; InterchangeError where it is not what was written."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from ldm.checkpoint_formats import read_tensors

    path.parent.mkdir(parents=True, exist_ok=True)
    apart = {name: tensor.contiguous() for name, tensor in tensors.items()}
    shared = _sharing(apart)
    apart |= {name: apart[name].clone() for name in shared}
    try:
        save_file(apart, path, metadata={"format": "pt"})                   # without it transformers takes the file for another framework's
    except SafetensorError as error:                                        # a full disk, for example
        raise InterchangeError(f"{path.name}: could not be written: {error}") from error
    written = read_tensors(path)
    wrong = [name for name, tensor in apart.items() if not _same(torch, written.get(name), tensor)]
    if wrong:
        raise InterchangeError(f"{path.name}: {wrong[0]} reads back otherwise than it was written; is the disk in order?")


def _sharing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names whose tensors are parts of memory that others use, or that is larger: safetensors stores whole tensors alone."""
    return [name for name, tensor in tensors.items() if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()]


def _same(torch: object, one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
