"""Writing of diffusers folders: a folder appears under its name complete and verified, or not at all."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.atomic import atomic_folder, temporary_next_to, write_errors
from ldm.checkpoint.diffusers.rules import ConversionError
from ldm.checkpoint.formats import read_tensors
from ldm.checkpoint.write import write_weights

WEIGHTS = (".ckpt", ".safetensors")  # suffixes of files of a model


def check_target(target: Path, suffixes: Sequence[str] = ()) -> None:
    """Raise ConversionError if the target exists, ends in none of `suffixes` or is in a folder that is read-only."""
    if target.exists() or target.is_symlink():
        raise ConversionError(f"--out {target}: already exists; choose another name or remove it first")
    if suffixes and target.suffix not in suffixes:
        raise ConversionError(f"--out {target}: the file name must end in {' or '.join(suffixes)}")
    try:
        with write_errors(target), temporary_next_to(target):
            pass
    except OSError as error:
        raise ConversionError(f"--out {error}") from error


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """`ldm.atomic.atomic_folder` with errors as ConversionError."""
    check_target(target)
    temporary = target
    try:
        with atomic_folder(target) as temporary:
            yield temporary
    except FileExistsError:
        check_target(target)
        raise
    except OSError as error:
        raise ConversionError(f"--out {str(error).replace(str(temporary), str(target))}") from error


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a .safetensors file and read it back; ConversionError if any bit differs."""
    write_weights(tensors, path, metadata={"format": "pt"})  # transformers needs it to accept the file
    written = read_tensors(path)
    wrong = [name for name, tensor in tensors.items() if name not in written or not torch.equal(written[name], tensor)]
    if wrong:
        raise ConversionError(f"{path.name}: {wrong[0]} differs when read back; check the disk")
