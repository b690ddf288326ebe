"""Checkpoints of training runs: Lightning's reader and writer, and the checkpoint that a run resumes from."""

import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from pytorch_lightning.plugins.io import CheckpointIO

from ldm.atomic import sweep_temporaries
from ldm.checkpoint.formats import (
    PARTS,
    CheckpointError,
    global_step,
    is_full_state,
    named_parts,
    read_checkpoint,
    read_entry,
    saved_at,
    verify_checkpoint,
)
from ldm.checkpoint.write import write_checkpoint

logger = logging.getLogger(__name__)

_PART = re.compile(r"\.?\d+(-of-\d+)?\.ckpt")  # beginning of the name of a part, or of its temporary file


class AtomicCheckpointIO(CheckpointIO):
    """Atomic writing and safe reading of Lightning checkpoints: `Trainer(plugins=[AtomicCheckpointIO()])`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise TypeError("storage_options are not supported: checkpoints are written to local files")
        write_checkpoint({**checkpoint, "saved_at": time.time()}, path)

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint as data; `weights_only=False` is refused, because it would run code from the file."""
        if weights_only is False:
            raise CheckpointError(f"{path}: weights_only=False is not supported: checkpoints are data")
        sweep_temporaries(Path(path).parent)
        return read_checkpoint(path, map_location=map_location or "cpu")

    def remove_checkpoint(self, path: str | os.PathLike) -> None:
        path = Path(path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
            remove_unused_parts(path.parent)


def remove_unused_parts(folder: Path) -> None:
    """Delete the parts that no index in a folder names: those of replaced checkpoints and of killed saves.

    Folders that hold anything but parts, and links, are not ours and stay. So do parts that are older than an index
    that cannot be read: they may be its own.
    """
    if not (folder / PARTS).is_dir() or (folder / PARTS).is_symlink():
        return
    used, of_damaged = set[Path](), 0.0
    for index in folder.glob("*.ckpt"):
        if index.is_dir():
            continue
        try:
            used |= {part.parent for part in named_parts(index, read_entry(index, PARTS))}
        except (CheckpointError, OSError):
            of_damaged = max(of_damaged, index.lstat().st_mtime)  # it was written after its parts
    for unused in set((folder / PARTS).iterdir()) - used:
        names = [path.name for path in unused.iterdir()] if unused.is_dir() and not unused.is_symlink() else []
        if names and all(map(_PART.match, names)) and unused.stat().st_mtime > of_damaged:
            shutil.rmtree(unused, ignore_errors=True)


def checkpoint_files(run_folder: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run, `last.ckpt` first, then the newest; without `crash.ckpt`, the state at an error.

    run_folder: a run's folder, or its checkpoints folder.
    """
    folder = Path(run_folder)
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    files = [*folder.glob("*.ckpt"), *folder.glob("*/*.ckpt")]  # checkpoints/trainstep_checkpoints/ too
    files = [path for path in files if path.name != "crash.ckpt" and not path.name.startswith(".")]
    return sorted(files, key=lambda path: (path.name == "last.ckpt", saved_at(path)), reverse=True)


def find_checkpoint(run_folder: str | os.PathLike, full_state: bool = False) -> Path:
    """The first whole file of `checkpoint_files`; if it is not `last.ckpt`, a warning says why.

    full_state: skip files of weights alone, from which no run can resume.
    """
    if not Path(run_folder).is_dir():
        raise CheckpointError(f"{run_folder}: no such folder")
    files, problems = checkpoint_files(run_folder), []
    if files and files[0].name != "last.ckpt":
        problems = ["last.ckpt is missing"]
    for path in files:
        try:
            verify_checkpoint(path)
            if full_state and path.name != "last.ckpt" and not is_full_state(path):
                raise CheckpointError(f"{path} holds only weights")
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            more = f" ({len(problems)} in all)" if len(problems) > 2 else ""
            why = "; ".join(problems[:2]) + more
            logger.warning("resuming from %s, step %s, because %s", path, global_step(path), why)
        return path
    if not files:
        raise CheckpointError(f"{run_folder}: no usable checkpoint (no .ckpt file found)")
    advice = "restore one from a copy, or start a new run with --base and the run's configs/*.yaml"
    first = problems[0].partition(" (")[0]
    raise CheckpointError(f"{run_folder}: none of {len(files)} checkpoints is usable, first {first}; {advice}")
