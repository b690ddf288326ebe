"""The published `SetupCallback`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from ldm.atomic import save_text
from ldm.config.files import config_text


class SetupCallback(pl.Callback):
    """Create the run directory when training begins, and save the configs of this start.

    resume: what the run resumes from, or None. A resume saves its configs after its first batch: one that fails leaves
    the run as it was.
    """

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
        self._saved = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            for folder in (self.logdir, self.ckptdir, self.cfgdir):
                folder.mkdir(parents=True, exist_ok=True)
            if self.resume is None:
                self._save(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.is_global_zero and not self._saved:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        self._saved = True
        if names := getattr(getattr(trainer, "datamodule", None), "class_names", None):
            save_text(self.cfgdir / "classes.txt", "".join(f"{name}\n" for name in names))
        lightning = OmegaConf.create({"lightning": self.lightning_config})
        save_text(self.cfgdir / f"{self.now}-project.yaml", config_text(self.config))
        save_text(self.cfgdir / f"{self.now}-lightning.yaml", config_text(lightning))
