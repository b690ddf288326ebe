"""A folder that appears under its name complete and read back, or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.checkpoint.diffusers.rules import InterchangeError

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: what a killed writer left stays there
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
        reason = str(error.strerror or error).replace(str(temporary), str(target))
        raise InterchangeError(f"--out {target}: could not be written: {reason} ({free:,} bytes free)") from error
    finally:
        if handle is not None:
            os.close(handle)
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(target: Path) -> None:
    for left in target.parent.glob(f".{glob.escape(target.name[:120])}.*.tmp"):
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


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a .safetensors file and read it back; InterchangeError where a bit of it is not what was written."""
    import torch

    from ldm.checkpoint.load import read_tensors, write_weights

    path.parent.mkdir(parents=True, exist_ok=True)
    write_weights(tensors, path, metadata={"format": "pt"})  # without it transformers takes it for another framework's
    written = read_tensors(path)
    wrong = [name for name, tensor in tensors.items() if name not in written or not torch.equal(written[name], tensor)]
    if wrong:
        raise InterchangeError(
            f"{path.name}: {wrong[0]} reads back otherwise than it was written; is the disk in order?"
        )
