"""The checkpoint that a training run resumes from, and the parts of sharded ones that none needs any more."""

import logging
import os
import re
import shutil
from pathlib import Path

from ldm.checkpoint.formats import (
    PARTS,
    CheckpointError,
    global_step,
    is_full_state,
    named_parts,
    read_entry,
    saved_at,
    verify_checkpoint,
)

logger = logging.getLogger(__name__)

_PART = re.compile(r"\.?\d+(-of-\d+)?\.ckpt")  # beginning of the name of a part, or of its temporary file


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
