"""Validation loss by noise level, of the trained and the averaged weights, as metrics and as a plot over training."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from ldm.callbacks.image_logger import gathered, never_stops_training, save_image
from ldm.config.instantiate import ConfigError
from ldm.config.types import PositiveFloat, PositiveInt
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.training import fixed_noise
from ldm.modules.ranks import average_over_ranks
from ldm.rng import Purpose, current_samples, normal_like
from ldm.visualize import Curve, grid, plot

logger = logging.getLogger(__name__)

CURVES = 6  # in a plot, from the first validation to the last
FIRST, LAST, NEWEST = (196, 206, 222), (64, 84, 122), (214, 88, 44)  # their colors


class Bin(NamedTuple):
    """Timesteps of about one log-SNR: the name of its metric, its center and the timesteps that are evaluated."""

    name: str
    log_snr: float
    timesteps: list[int]


class LossBySNR(pl.Callback):
    """Log `val/loss_logsnr_<center>` at each validation, and `..._ema` with the averaged weights.

    A metric is the mean error of the network's output (of `loss_type`, unweighted, in the model's parameterization) at
    timesteps whose log(alpha^2 / sigma^2) is in the bin around the center; the center -inf is a timestep without
    signal. Samples, timesteps and noise are the same at every validation and for every number of ranks.
    `images/val/loss_by_logsnr.png` and TensorBoard show the curves over the course of training.

    samples: validation samples, the first ones of all ranks. bin_width: of log-SNR; centers are its multiples.
    timesteps_per_bin: evenly spaced in the bin. every: validations from one evaluation to the next.
    Each costs samples * bins * timesteps_per_bin passes of one image through the network, twice with averaged weights,
    and no further ones through the first stage than one of each sample.
    """

    def __init__(
        self,
        samples: PositiveInt = 64,
        bin_width: PositiveFloat = 2.0,
        timesteps_per_bin: PositiveInt = 2,
        every: PositiveInt = 1,
    ) -> None:
        super().__init__()
        self.samples, self.bin_width, self.per_bin, self.every = samples, bin_width, timesteps_per_bin, every
        self.bins: list[Bin] = []
        self.validations = 0
        self.history: list[dict[str, Any]] = []  # {"step": ..., "losses": {metric: value}} of each validation
        self._sums: Tensor | None = None  # of the errors of each bin, raw and averaged, then the number of samples
        self._seconds = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, DDPM):
            raise ConfigError(f"LossBySNR: {type(pl_module).__name__} is not a diffusion model; remove the callback")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DDPM)
        self.bins = snr_bins(pl_module.alphas_cumprod.cpu().double().numpy(), self.bin_width, self.per_bin)
        passes = self.samples * sum(len(each.timesteps) for each in self.bins) * (2 if pl_module.use_ema else 1)
        text = "%-11s validation loss in %d bins of log-SNR: at most %d passes of an image through the network"
        logger.info(text, "loss", len(self.bins), passes)

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations, "history": self.history}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.validations, self.history = state_dict["validations"], list(state_dict["history"])

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = trainer.state.fn == "fit" and not trainer.sanity_checking and self.validations % self.every == 0
        self._sums, self._seconds = torch.zeros(2 * len(self.bins) + 1) if due else None, 0.0
        self.validations += trainer.state.fn == "fit" and not trainer.sanity_checking

    # At the start of the batch: its samples have their random numbers until its end.
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        assert isinstance(pl_module, DDPM)
        counted = self._counted(batch_idx, pl_module.batch_size_of(batch))
        if self._sums is None or dataloader_idx > 0 or counted is None:
            return
        number = max(counted, 1)  # every rank calls the network: together, if it is sharded
        start, mask = time.monotonic(), pl_module.loss_options(batch).get("mask")
        context = trainer.precision_plugin.val_step_context()
        with torch.no_grad(), context, fixed_noise(batch_idx, pl_module.device):
            with gathered(pl_module):
                x, cond = pl_module.clean_inputs(batch, number)
            noise, mask = normal_like(x, Purpose.NOISE), None if mask is None else mask[:number]
            sums = []
            for scope in (nullcontext(), pl_module.ema_scope()) if pl_module.use_ema else (nullcontext(),):
                with scope, gathered(pl_module):
                    for each in self.bins:
                        at = [torch.full((number,), t, device=x.device, dtype=torch.int64) for t in each.timesteps]
                        errors = torch.stack([pl_module.denoising_errors(x, cond, t, noise, mask) for t in at])
                        sums.append(errors[:, :counted].float().mean(dim=0).sum())
        self._sums[: len(sums)] += torch.stack(sums).cpu()
        self._sums[-1] += counted
        self._seconds += time.monotonic() - start

    def _counted(self, batch_idx: int, batch_size: int) -> int | None:
        """Return how many of the batch's first samples are among the first `samples` of all ranks.

        None, on all ranks, if no rank's batch has one of these.
        """
        samples, start = current_samples(), batch_idx * batch_size
        places: Sequence[int] = range(batch_size)
        if samples is not None and samples.places:
            start = samples.start
            places = samples.places[:batch_size] if samples.weight else ()  # it may only fill the last round
        return None if start >= self.samples else sum(start + place < self.samples for place in places)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._sums is None:
            return
        assert isinstance(pl_module, DDPM)
        sums, self._sums = average_over_ranks(self._sums.to(pl_module.device)).cpu(), None
        names = [each.name for each in self.bins]
        if pl_module.use_ema:
            names += [f"{name}_ema" for name in names]
        losses = dict(zip(names, (sums[:-1] / sums[-1].clamp(min=1e-30)).tolist()))
        pl_module.log_dict(losses, on_epoch=True, sync_dist=True, batch_size=1)
        step = trainer.global_step
        self.history.append({"step": step, "losses": losses})
        if trainer.is_global_zero:
            shown = [each for each in self.bins if math.isfinite(each.log_snr)]
            places = sorted({0, len(shown) // 2, len(shown) - 1}) if shown else []
            text = ", ".join(f"{losses[shown[k].name]:.4g} at {shown[k].log_snr:g}" for k in places)
            logger.info("%-11s by log-SNR, step %d: %s (%.1f s)", "loss", step, text, self._seconds)
            with never_stops_training("val", step):
                save_image(trainer, self.render(pl_module), "loss_by_logsnr.png", "val/loss_by_logsnr", step)

    def render(self, model: DDPM) -> Image.Image:
        """Plot the losses of some validations, from the first to the last, over log-SNR."""
        chosen = sorted({round(k) for k in np.linspace(0, len(self.history) - 1, CURVES)})
        panels = {"trained weights": ""} | ({"averaged weights (EMA)": "_ema"} if model.use_ema else {})
        shown = [each for each in self.bins if math.isfinite(each.log_snr)]
        every = [value for each in self.history for value in each["losses"].values()]
        limits = min(every), max(every)
        images = []
        for name, suffix in panels.items():
            curves = []
            for number, k in enumerate(chosen):
                losses, share = self.history[k]["losses"], number / max(1, len(chosen) - 1)
                points = [(each.log_snr, losses[each.name + suffix]) for each in shown if each.name in losses]
                between = tuple(round(a + share * (b - a)) for a, b in zip(FIRST, LAST))
                color = NEWEST if k == chosen[-1] else between
                curves.append(Curve(points, f"step {self.history[k]['step']:,}", color))
            title = f"validation loss ({model.loss_type}, {model.parameterization}), {name}"
            images.append(plot(curves, title, "log-SNR: less noise to the right", limits))
        return grid(images, columns=2, padding=8)


def snr_bins(alphas_cumprod: np.ndarray, width: float, per_bin: int) -> list[Bin]:
    """Return the bins of log-SNR that have timesteps, from the most noise to the least."""
    with np.errstate(divide="ignore"):
        log_snr = np.log(alphas_cumprod) - np.log1p(-alphas_cumprod)
    centers = np.floor(log_snr / width + 0.5) * width
    bins = []
    for center in np.unique(centers):
        inside = np.flatnonzero(centers == center)
        places = np.linspace(0, len(inside) - 1, 2 * per_bin + 1)[1::2]
        timesteps = sorted({int(inside[round(place)]) for place in places})
        bins.append(Bin(f"val/loss_logsnr_{center + 0.0:g}", float(center), timesteps))
    return bins
