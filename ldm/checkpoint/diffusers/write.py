"""Writing of diffusers folders: a folder appears under its name complete and verified, or not at all."""

import contextlib
import glob
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint.diffusers.rules import ConversionError
from ldm.checkpoint.formats import read_tensors
from ldm.checkpoint.write import sweep_temporaries, sync, temporary_next_to, write_weights


def check_target(target: Path) -> None:
    """Raise ConversionError if the target exists."""
    if target.exists() or target.is_symlink():
        raise ConversionError(f"--out {target}: already exists; choose another name or remove it first")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder to write into, renamed to `target` at the end and deleted after an error.

    Temporary folders of this target that killed writers left are deleted too.
    """
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(target.parent, f".{glob.escape(target.name[:120])}.*.tmp", folders=True)
    with temporary_next_to(target, folder=True) as temporary:
        try:
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            check_target(target)
            temporary.rename(target)
            sync(target.parent)
        except OSError as error:
            free = shutil.disk_usage(target.parent).free
            reason = str(error.strerror or error).replace(str(temporary), str(target))
            raise ConversionError(f"--out {target}: could not be written: {reason} ({free:,} bytes free)") from error


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a .safetensors file and read it back; ConversionError if any bit differs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_weights(tensors, path, metadata={"format": "pt"})  # transformers needs it to accept the file
    written = read_tensors(path)
    wrong = [name for name, tensor in tensors.items() if name not in written or not torch.equal(written[name], tensor)]
    if wrong:
        raise ConversionError(f"{path.name}: {wrong[0]} differs when read back; check the disk")
