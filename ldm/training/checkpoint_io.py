"""Lightning's reader and writer of checkpoints."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from pytorch_lightning.plugins.io import CheckpointIO

from ldm.atomic import sweep_temporaries
from ldm.checkpoint.formats import CheckpointError, read_checkpoint
from ldm.checkpoint.resume import remove_unused_parts
from ldm.checkpoint.write import write_checkpoint


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
