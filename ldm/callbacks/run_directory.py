"""The published `SetupCallback`."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from ldm.atomic import save_text


class SetupCallback(pl.Callback):
    """Create the run directory when training begins, and save the configs of this start."""

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
        if names := getattr(getattr(trainer, "datamodule", None), "class_names", None):
            save_text(self.cfgdir / "classes.txt", "".join(f"{name}\n" for name in names))
        lightning = OmegaConf.create({"lightning": self.lightning_config})
        save_text(self.cfgdir / f"{self.now}-project.yaml", OmegaConf.to_yaml(self.config))
        save_text(self.cfgdir / f"{self.now}-lightning.yaml", OmegaConf.to_yaml(lightning))
