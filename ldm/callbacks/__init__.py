"""Callbacks of a training run: run directory, image logs, checkpoints, signals, seeds and reports."""

from ldm.callbacks.checkpoints import CheckpointPolicy, CrashCheckpoint
from ldm.callbacks.image_logger import ImageLogger
from ldm.callbacks.nonfinite import StopOnNonFinite
from ldm.callbacks.progress import CUDACallback, ProgressBar, RunReport
from ldm.callbacks.resume import ExactResume
from ldm.callbacks.run_directory import SetupCallback
from ldm.callbacks.seeding import StepSeed
from ldm.callbacks.signals import SignalCallback, Stopped

__all__ = [
    "CUDACallback",
    "CheckpointPolicy",
    "CrashCheckpoint",
    "ExactResume",
    "ImageLogger",
    "ProgressBar",
    "RunReport",
    "SetupCallback",
    "SignalCallback",
    "StepSeed",
    "StopOnNonFinite",
    "Stopped",
]
