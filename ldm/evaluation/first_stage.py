"""Reconstructions of a first stage, and what its latents look like."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint import WeightsSource, ensure_weights, load_weights
from ldm.config.instantiate import instantiate_from_config
from ldm.data.image import from_tensor
from ldm.evaluation.card import Metric
from ldm.evaluation.distances import Interval, mean_interval
from ldm.evaluation.evaluate import paired_frechet_metric
from ldm.evaluation.figure import COLUMNS, Section, card_figure
from ldm.evaluation.image_sets import ImageSet
from ldm.models.vq import VQModel
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.lpips import LPIPS, VGG16_URL, VGG16_VARIABLE

logger = logging.getLogger(__name__)


class Reconstructions(NamedTuple):
    """Reconstructions uint8 (N, H, W, 3), errors of each image, and the latents' values."""

    images: np.ndarray
    errors: dict[str, np.ndarray]  # mse (of [0, 1]), ssim, lpips: each (N,)
    latents: dict[str, Any]


def load_first_stage(config: Mapping[str, Any], source: WeightsSource, use_ema: bool | None, device: Any) -> Any:
    """The first stage of a config with the weights of a file, in eval mode."""
    model = instantiate_from_config(config["model"])
    averages = bool(getattr(model, "use_ema", False)) if use_ema is None else use_ema
    load_weights(model, source, use_ema=averages)
    ensure_weights(model)
    return model.requires_grad_(False).eval().to(device)


@torch.no_grad()
def reconstruct(
    model: Any, images: ImageSet, batch_size: int, device: Any, perceptual: LPIPS | None
) -> Reconstructions:
    """Encode and decode every image; a KL first stage decodes the mode of its posterior.

    All errors are those of the 8-bit images, which are also what the rFID is of.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim  # seconds to import

    kept: list[np.ndarray] = []
    errors: dict[str, list[Tensor]] = {
        name: [] for name in ("mse", "ssim", *(() if perceptual is None else ("lpips",)))
    }
    latents = Latents(model)
    with tqdm(total=len(images), desc="reconstructions", unit="image") as bar:
        for first in range(0, len(images), batch_size):
            batch = np.stack([images.image(k) for k in range(first, min(first + batch_size, len(images)))])
            x = torch.from_numpy(batch).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1.0
            kept += [np.asarray(from_tensor(each).convert("RGB")) for each in latents.decoded(x).float().clamp(-1, 1)]
            y = torch.from_numpy(np.stack(kept[first:])).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1.0
            errors["mse"].append((((x - y) / 2) ** 2).mean(dim=(1, 2, 3)).cpu())
            similarity = ssim((y + 1) / 2, (x + 1) / 2, data_range=1.0, reduction="none")  # defined for values >= 0
            errors["ssim"].append(torch.as_tensor(similarity).reshape(-1).cpu())
            if perceptual is not None:
                errors["lpips"].append(perceptual(y, x).reshape(-1).cpu())
            bar.update(len(x))
    arrays = {name: torch.cat(parts).double().numpy() for name, parts in errors.items()}
    return Reconstructions(np.stack(kept), arrays, latents.summary())


class Latents:
    """Mean, standard deviation and use of the codebook of all latents that pass through."""

    def __init__(self, model: Any) -> None:
        self.model, self.n, self.sum, self.squares = model, 0, torch.zeros(0), torch.zeros(0)
        self.counts: Tensor | None = torch.zeros(model.n_codes) if isinstance(model, VQModel) else None
        self.kl: list[Tensor] = []

    def decoded(self, x: Tensor) -> Tensor:
        """The reconstruction of images (B, 3, H, W)."""
        if isinstance(self.model, VQModel):
            z, _, (_, _, codes) = self.model.quantize(self.model.encode_to_prequant(x))
            assert self.counts is not None
            self.counts += torch.bincount(codes.reshape(-1).cpu(), minlength=len(self.counts))
            self._count(z)
            return self.model.decode_latent(z)
        posterior = self.model.encode(x)
        z = posterior.mode() if isinstance(posterior, DiagonalGaussianDistribution) else posterior
        if isinstance(posterior, DiagonalGaussianDistribution):
            self.kl.append(posterior.kl().cpu())
        self._count(z)
        return self.model.decode(z)

    def _count(self, z: Tensor) -> None:
        flat = z.double().cpu().transpose(0, 1).flatten(1)  # (C, B * h * w)
        self.n += flat.shape[1]
        self.sum = flat.sum(1) + (self.sum if len(self.sum) else 0)
        self.squares = flat.square().sum(1) + (self.squares if len(self.squares) else 0)
        self.shape = list(z.shape[1:])

    def summary(self) -> dict[str, Any]:
        mean, square = self.sum / self.n, self.squares / self.n
        overall = (square.mean() - mean.mean() ** 2).clamp(min=0).sqrt()
        found: dict[str, Any] = {
            "shape": self.shape,
            "mean": float(mean.mean()),
            "std": float(overall),
            "channel_mean": mean.tolist(),
            "channel_std": (square - mean**2).clamp(min=0).sqrt().tolist(),
        }
        if self.kl:
            found["kl"] = float(torch.cat(self.kl).mean())
        if self.counts is not None:
            share = self.counts.double() / self.counts.sum()
            found["codebook_usage"] = float((share > 0).double().mean())
            found["codebook_perplexity"] = float(torch.exp(-torch.special.xlogy(share, share).sum()))
        return found


def load_lpips(device: Any) -> tuple[LPIPS | None, str]:
    """LPIPS with its weights; None and the reason if they are not available (nothing is downloaded)."""
    perceptual = LPIPS()
    copy = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_URL.rsplit("/", 1)[1]
    if not os.environ.get(VGG16_VARIABLE) and not copy.is_file():
        return None, f"needs VGG16: set ${VGG16_VARIABLE} to a copy of {VGG16_URL}"
    perceptual.load_pretrained()
    return perceptual.to(device), ""


def psnr_interval(mse: np.ndarray) -> Interval:
    """PSNR in dB of all pixels, from the mean squared error of each image (N,) in [0, 1], with its interval."""

    def decibels(error: float) -> float:
        return float("inf") if error <= 0 else float(-10 * np.log10(error))

    center = mean_interval(mse)
    return Interval(decibels(center.value), decibels(center.high), decibels(center.low))


def first_stage_metrics(found: Reconstructions, originals: np.ndarray, reconstructed: np.ndarray) -> dict[str, Metric]:
    """Metrics of reconstructions, from their errors and the features (N, D) of the originals and of them."""
    metrics = {"psnr": Metric(*psnr_interval(found.errors["mse"]))}
    metrics |= {name: Metric(*mean_interval(found.errors[name])) for name in ("ssim", "lpips") if name in found.errors}
    return {**metrics, "rfid": paired_frechet_metric(originals, reconstructed)}


def first_stage_figure(title: str, images: ImageSet, found: Reconstructions, seed: int = 0) -> Image.Image:
    """Random, best and worst reconstructions, each below its original, with the difference, from gray, below it."""
    count = min(COLUMNS, len(images))
    order = np.argsort(found.errors["mse"], kind="stable")
    random = np.sort(np.random.RandomState(seed).permutation(len(images))[:count])
    chosen = {"random": random, "best": order[:count], "worst": order[::-1][:count]}
    sections = []
    for name, indices in chosen.items():
        rows = [[images.image(int(k)) for k in indices], [found.images[k] for k in indices]]
        rows.append([difference(*pair) for pair in zip(*rows)])
        sections.append(Section(f"{name}: original, reconstruction, difference", rows))
    return card_figure(title, sections)


def difference(original: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """Four times the difference of two images uint8 (H, W, 3), gray where they are equal."""
    return np.clip(128 + 4 * (reconstruction.astype(int) - original), 0, 255).astype(np.uint8)
