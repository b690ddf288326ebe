"""Weights and checkpoints: open, load, write. They are data and never run code.

`open_weights` knows every kind of path, `load_weights` fills a module, `write_weights` and `write_checkpoint` write
atomically. `ldm.checkpoint.resume` finds the checkpoint of a run.
"""

from ldm.atomic import sweep_temporaries
from ldm.checkpoint.formats import (
    CheckpointError,
    MissingWeightsError,
    UnsafeCheckpointError,
    read_checkpoint,
    verify_checkpoint,
)
from ldm.checkpoint.load import (
    LoadReport,
    ensure_weights,
    load_weights,
    read_step,
    read_weights,
    refuse_adapters,
    weights_on_meta,
)
from ldm.checkpoint.source import WeightsSource, open_weights
from ldm.checkpoint.write import CheckpointWriteError, write_checkpoint, write_weights

__all__ = [
    "CheckpointError",
    "CheckpointWriteError",
    "LoadReport",
    "MissingWeightsError",
    "UnsafeCheckpointError",
    "WeightsSource",
    "ensure_weights",
    "load_weights",
    "open_weights",
    "read_checkpoint",
    "read_step",
    "read_weights",
    "refuse_adapters",
    "sweep_temporaries",
    "verify_checkpoint",
    "weights_on_meta",
    "write_checkpoint",
    "write_weights",
]
