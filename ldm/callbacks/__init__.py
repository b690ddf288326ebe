"""What happens beside the training step: run folders, pictures, checkpoints, signals, seeds and reports."""

from ldm.callbacks.checkpoints import CheckpointPolicy, CrashCheckpoint
from ldm.callbacks.image_logger import ImageLogger
from ldm.callbacks.progress import ProgressBar, RunReport
from ldm.callbacks.resume import ExactResume
from ldm.callbacks.run import CUDACallback, SetupCallback
from ldm.callbacks.signals import SignalCallback, Stopped
from ldm.callbacks.steps import StepSeed, StopOnNonFinite

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
