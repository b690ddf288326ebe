"""Reading, loading and writing of weights and checkpoints; weights are data and never run code."""

from ldm.checkpoint.load import (
    CheckpointError,
    LoadReport,
    UnsafeCheckpointError,
    ensure_weights,
    load_weights,
    read_checkpoint,
    read_step,
    read_weights,
    verify_checkpoint,
)

__all__ = [
    "CheckpointError",
    "LoadReport",
    "UnsafeCheckpointError",
    "ensure_weights",
    "load_weights",
    "read_checkpoint",
    "read_step",
    "read_weights",
    "verify_checkpoint",
]
