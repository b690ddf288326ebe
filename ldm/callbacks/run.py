"""The run folder's files, and what an epoch cost."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

logger = logging.getLogger(__name__)

MIB = 2**20


class SetupCallback(pl.Callback):
    """Makes the run folder when training begins, and saves the configs that it was started with."""

    def __init__(
        self,
        resume: str | None,
        now: str,
        logdir: str | Path,
        ckptdir: str | Path,
        cfgdir: str | Path,
        config: DictConfig,
        lightning_config: DictConfig,
    ) -> None:
        super().__init__()
        self.resume, self.now = resume, now
        self.logdir, self.ckptdir, self.cfgdir = Path(logdir), Path(ckptdir), Path(cfgdir)
        self.config, self.lightning_config = config, lightning_config

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for folder in (self.logdir, self.ckptdir, self.cfgdir):
            folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, self.cfgdir / f"{self.now}-project.yaml")
        OmegaConf.save(
            OmegaConf.create({"lightning": self.lightning_config}), self.cfgdir / f"{self.now}-lightning.yaml"
        )


class CUDACallback(pl.Callback):
    """Seconds and peak memory of every epoch: of the GPU where there is one, else of the process."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._device = trainer.strategy.root_device
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            torch.cuda.synchronize(self._device)
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not hasattr(self, "_start"):  # resumed in mid-epoch: Lightning starts no epoch then
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        figures = torch.tensor([time.monotonic() - self._start, _peak_mib(self._device)], device=self._device)
        seconds, memory = trainer.strategy.reduce(figures, reduce_op="mean").tolist()
        if trainer.is_global_zero:
            logger.info("%-11s %d took %.1f s, peak memory %.0f MiB", "epoch", trainer.current_epoch, seconds, memory)


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    import sys

    peak: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024  # bytes there, KiB elsewhere
