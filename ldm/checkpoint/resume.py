"""Checkpoints of training runs: Lightning's reader and writer, and the checkpoint that a run resumes from."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from pytorch_lightning.plugins.io import CheckpointIO

from ldm.atomic import sweep_temporaries
from ldm.checkpoint.formats import CheckpointError, read_checkpoint, verify_checkpoint
from ldm.checkpoint.write import write_checkpoint

logger = logging.getLogger(__name__)


class AtomicCheckpointIO(CheckpointIO):
    """Atomic writing and safe reading of Lightning checkpoints: `Trainer(plugins=[AtomicCheckpointIO()])`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise TypeError("storage_options are not supported: checkpoints are written to local files")
        write_checkpoint(checkpoint, path)

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


def find_checkpoint(run_folder: str | os.PathLike) -> Path:
    """The checkpoint that a run resumes from: `last.ckpt`, or the newest other one if it is missing or damaged.

    run_folder: a run's folder, or its checkpoints folder. `crash.ckpt`, the state at an error, is used only if named.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    files = [*folder.glob("*.ckpt"), *folder.glob("*/*.ckpt")]  # checkpoints/trainstep_checkpoints/ too
    others = [path for path in files if path.name not in ("last.ckpt", "crash.ckpt") and not path.name.startswith(".")]
    candidates = [folder / "last.ckpt", *sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)]
    damaged: list[str] = []
    for path in filter(Path.is_file, candidates):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        if damaged:
            logger.warning("resuming from %s, because %s", path, "; ".join(damaged))
        return path
    raise CheckpointError(f"{folder}: no usable checkpoint ({'; '.join(damaged) or 'no .ckpt file found'})")
