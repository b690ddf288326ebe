"""Callbacks of a training run: run directory, image logs, checkpoints, signals, seeds and reports."""

from ldm.callbacks.checkpoints import CheckpointPolicy as CheckpointPolicy
from ldm.callbacks.checkpoints import CrashCheckpoint as CrashCheckpoint
from ldm.callbacks.data_check import DataCheck as DataCheck
from ldm.callbacks.ema_snapshots import EMASnapshots as EMASnapshots
from ldm.callbacks.image_logger import ImageLogger as ImageLogger
from ldm.callbacks.loss_by_snr import LossBySNR as LossBySNR
from ldm.callbacks.nonfinite import StopOnNonFinite as StopOnNonFinite
from ldm.callbacks.progress import CompileTime as CompileTime
from ldm.callbacks.progress import CUDACallback as CUDACallback
from ldm.callbacks.progress import ProgressBar as ProgressBar
from ldm.callbacks.progress import RunReport as RunReport
from ldm.callbacks.resume import ExactResume as ExactResume
from ldm.callbacks.run_directory import SetupCallback as SetupCallback
from ldm.callbacks.seeding import StepSeed as StepSeed
from ldm.callbacks.signals import SignalCallback as SignalCallback
