"""Image logs of training as PNG files and in TensorBoard; logging never stops or changes training."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, ImageOps
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ldm.atomic import save_bytes
from ldm.callbacks.checkpoints import is_sharded
from ldm.callbacks.signals import SignalCallback
from ldm.config.instantiate import ConfigError
from ldm.config.types import NonNegativeInt
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.fixed_samples import FixedSamples
from ldm.output.images import png_bytes
from ldm.rng import preserve_rng, samples_set, seed_generators
from ldm.visualize import grid

logger = logging.getLogger(__name__)

GRID_COLUMNS = 4
SEED = 23  # every log samples from the same noise, so that successive images show what training changed


class ImageLogger(pl.Callback):
    """Call the model's `log_images(batch, split=...)` every `batch_frequency` optimizer steps and save the images.

    increase_log_steps: also at the powers of `early_factor` up to `batch_frequency`: steps 1, 2, 4, 8, ...
    log_on_batch_idx: count batches instead of steps. log_first_step: also log step 0.
    clamp: clamp to [-1, 1]. rescale: images are in [-1, 1]; False if they are in [0, 1].
    Validation logs its first batch, at most once in `batch_frequency` steps.
    fixed_samples: also sample fixed prompts from fixed noise at every validation, see FixedSamples, as a grid with
    captions, `images/val/fixed_gs-<step>_e-<epoch>.png`.
    Files are `images/<split>/<key>_gs-<step>_e-<epoch>_b-<batch>.png`; their steps count from 0, as published, those of
    log lines from 1.
    """

    def __init__(
        self,
        batch_frequency: int,
        max_images: NonNegativeInt,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_on_batch_idx: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: Mapping[str, Any] | None = None,
        early_factor: Annotated[int, ">= 2"] = 2,
        fixed_samples: Annotated[Mapping[str, Any], "ldm.models.diffusion.fixed_samples.FixedSamples"] | None = None,
    ) -> None:
        super().__init__()
        if batch_frequency < 1:
            raise ValueError(
                f"batch_frequency {batch_frequency}: expected at least 1; disabled: true turns image logs off"
            )
        self.batch_freq, self.max_images = batch_frequency, max_images
        powers = range(int(math.log(batch_frequency, early_factor)) + 2)
        early = {early_factor**n for n in powers if early_factor**n <= batch_frequency}
        self.early_steps = early if increase_log_steps else set()
        self.clamp, self.rescale, self.disabled = clamp, rescale, disabled
        self.log_on_batch_idx, self.log_first_step = log_on_batch_idx, log_first_step
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self.fixed_samples = None if fixed_samples is None else FixedSamples(**fixed_samples)
        self._seen: dict[str, int] = {}  # split -> the last step that was considered or logged

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.fixed_samples is None:
            return
        place = "lightning.callbacks.image_logger.params.fixed_samples"
        if not isinstance(pl_module, DDPM):
            raise ConfigError(f"{place}: {type(pl_module).__name__} is not a diffusion model; remove the section")
        try:
            self.fixed_samples.check(pl_module)
        except ValueError as error:
            raise ConfigError(f"{place}.{error}") from error

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.log_on_batch_idx:
            # A resumed run does not log its last step again.
            self._seen["train"] = training_step_index(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = training_step_index(trainer, pl_module)
        index = batch_idx if self.log_on_batch_idx else step
        if self._seen.get("train") == index:  # the other batches of an accumulated step
            return
        self._seen["train"] = index
        if self.is_due(index):
            self._log(trainer, pl_module, batch, batch_idx, "train", step)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        step = training_step_index(trainer, pl_module)
        if trainer.sanity_checking or trainer.state.fn != "fit" or step < 0:
            return
        if self.log_on_batch_idx:
            due = self.is_due(batch_idx)
        else:
            last = self._seen.get("val")
            due = batch_idx == 0 and dataloader_idx == 0 and (last is None or step - last >= self.batch_freq)
        if due:
            self._seen["val"] = step
            self._log(trainer, pl_module, batch, batch_idx, "val", step)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = training_step_index(trainer, pl_module)
        if self.fixed_samples is None or self.disabled or not _takes_part(trainer):
            return
        if trainer.sanity_checking or trainer.state.fn != "fit" or step < 0:
            return
        assert isinstance(pl_module, DDPM)
        with never_stops_training("fixed", step + 1):
            with _unchanged(pl_module, pl_module.device), _cut_short_by_signals(trainer):
                seed_generators(SEED)
                images, captions = self.fixed_samples.sample(pl_module)
            if not trainer.is_global_zero:
                return
            cells = [self._grid(each) for each in images]
            # Large enough for captions.
            cells = [ImageOps.scale(each, max(1, 96 // each.width), Image.Resampling.NEAREST) for each in cells]
            image = grid(cells, captions, columns=GRID_COLUMNS)
            name = f"fixed_gs-{step:06}_e-{trainer.current_epoch:06}.png"
            save_image(trainer, image, name, "val/fixed", step)
            logger.info("%-11s fixed, step %d: %d samples", "images", step + 1, len(images))

    def is_due(self, index: int) -> bool:
        """True if the step (or batch) with this index, counted from 0, is logged."""
        if index < 0 or (index == 0 and not self.log_first_step):
            return False
        return index % self.batch_freq == 0 or index in self.early_steps

    def _log(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, split: str, step: int
    ) -> None:
        log_images = getattr(pl_module, "log_images", None)
        if self.disabled or not callable(log_images) or self.max_images < 1 or not _takes_part(trainer):
            return
        with never_stops_training(split, step + 1):
            with _unchanged(pl_module, pl_module.device), _cut_short_by_signals(trainer), torch.no_grad():
                seed_generators(SEED)
                images = log_images(batch, split=split, **self.log_images_kwargs)
            if not trainer.is_global_zero:
                return
            grids = {key: self._grid(value) for key, value in images.items()}
            for key, image in grids.items():
                name = f"{key.replace('/', '_')}_gs-{step:06}_e-{trainer.current_epoch:06}_b-{batch_idx:06}.png"
                save_image(trainer, image, name, f"{split}/{key}", step)
            logger.info("%-11s %s, step %d: %s", "images", split, step + 1, ", ".join(grids))

    def _grid(self, images: Tensor) -> Image.Image:
        """Return the first `max_images` of (B, C, H, W), or a finished (C, H, W), as one image on black."""
        images = images.detach().float().cpu()
        images = images[None] if images.ndim == 3 else images[: self.max_images]
        if self.clamp:
            images = images.clamp(-1.0, 1.0)
        if not self.rescale:
            images = images * 2 - 1
        if images.shape[1] == 2:  # as red and green
            images = torch.cat([images, torch.full_like(images[:, :1], -1.0)], dim=1)
        return grid(list(images[:, :3]), columns=GRID_COLUMNS, background="black")


def save_image(trainer: pl.Trainer, image: Image.Image, name: str, tag: str, step: int) -> None:
    """Save an image as `images/<split>/<name>` of the run and in TensorBoard, under a tag `<split>/...`."""
    save_bytes(Path(trainer.default_root_dir) / "images" / tag.partition("/")[0] / name, png_bytes(image))
    for board in trainer.loggers:
        if isinstance(board, TensorBoardLogger):
            board.experiment.add_image(tag, np.asarray(image), step, dataformats="HWC")


@contextmanager
def never_stops_training(split: str, step: int) -> Iterator[None]:
    """Log an error within the block as one line instead of raising it."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        logger.warning("%-11s %s, step %d: failed, training continues: %s", "images", split, step, reason)
        logger.debug("traceback of the failed image log:", exc_info=True)


def training_step_index(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
    """Return the index, from 0, of the last optimizer step (by the model's `logging_step` if any); -1 before it."""
    return int(getattr(pl_module, "logging_step", trainer.global_step)) - 1


def _takes_part(trainer: pl.Trainer) -> bool:
    """True on the first rank, which writes the images, and on all ranks if networks compute on all of them together."""
    return trainer.is_global_zero or is_sharded(trainer)


def _cut_short_by_signals(trainer: pl.Trainer) -> AbstractContextManager[None]:
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks", [])  # Lightning does not declare it
    signals = next((each for each in callbacks if isinstance(each, SignalCallback)), None)
    if signals is None or is_sharded(trainer):  # its ranks would stop at different calls and wait for each other
        return nullcontext()
    return signals.cutting_short()


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gather the weights of a sharded model that only its own forward pass would gather."""
    if isinstance(module, FSDPModule):
        module.unshard()
    try:
        yield
    finally:
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def _unchanged(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Put the module into eval mode; restore its modes and the random generators afterwards."""
    modes = {part: part.training for part in module.modules()}
    with preserve_rng(device), samples_set(None):  # as published: noise of the global generators
        module.eval()
        try:
            with gathered(module):
                yield
        finally:
            for part, training in modes.items():
                part.training = training
