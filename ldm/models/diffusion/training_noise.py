"""Noise of training steps other than independent normal numbers: `noise_config` of a diffusion model.

The noise belongs to the samples. Validation uses independent normal numbers, as sampling does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.config.types import NonNegativeFloat, NonNegativeInt, Probability
from ldm.rng import Purpose, normal_like


class NoisePair(NamedTuple):
    """Noise (B, C, H, W) of the training target, and noise of the network's input."""

    target: Tensor
    seen: Tensor


class TrainingNoise:
    """Offset noise, multi-resolution noise and input perturbation, alone or together.

    offset_strength: standard deviation s of a random constant that is added to each channel (Guttenberg, "Diffusion
        with Offset Noise", crosslabs.org, 2023): variance 1 + s^2, covariance s^2 of two positions of a channel; 0.1 is
        common.
    multires_iterations, multires_discount: add noise of half, a quarter, ... of the height and width, upsampled
        (bilinear) and scaled by discount^k, until one is 1 or the iterations end (Whitaker, "Multi-Resolution Noise for
        Diffusion Model Training", 2023). Every value then is divided by its standard deviation, so its variance is 1.
    input_perturbation: gamma of the noise eps + gamma * xi that only the network's input gets, 0.1 in the paper
        (arXiv 2301.11706). The target is that of eps.
    """

    def __init__(
        self,
        offset_strength: NonNegativeFloat = 0.0,
        multires_iterations: NonNegativeInt = 0,
        multires_discount: Probability = 0.3,
        input_perturbation: NonNegativeFloat = 0.0,
    ) -> None:
        self.offset_strength, self.input_perturbation = offset_strength, input_perturbation
        self.multires_iterations, self.multires_discount = multires_iterations, multires_discount

    def __call__(self, x: Tensor) -> NoisePair:
        """Sample the noise for x (B, C, H, W)."""
        noise = normal_like(x, Purpose.NOISE)
        height, width = x.shape[2:]
        scales: list[float] = []
        while len(scales) < self.multires_iterations and min(height, width) >> len(scales) > 1:
            k = len(scales) + 1
            small = normal_like(x.new_empty(*x.shape[:2], height >> k, width >> k), Purpose.MULTIRES_NOISE)
            noise = noise + self.multires_discount**k * F.interpolate(small, size=(height, width), mode="bilinear")
            scales.append(self.multires_discount**k)
        if scales:
            noise = noise / torch.as_tensor(_standard_deviation(height, width, tuple(scales))).to(x)
        if self.offset_strength > 0:
            noise = noise + self.offset_strength * normal_like(x.new_empty(*x.shape[:2], 1, 1), Purpose.OFFSET_NOISE)
        if self.input_perturbation > 0:
            return NoisePair(noise, noise + self.input_perturbation * normal_like(x, Purpose.INPUT_PERTURBATION))
        return NoisePair(noise, noise)


@lru_cache(maxsize=32)
def _standard_deviation(height: int, width: int, scales: tuple[float, ...]) -> np.ndarray:
    """Standard deviation (H, W) of white noise plus scales[k] times noise upsampled from 2^-(k+1)."""
    variance = np.ones((height, width))
    for k, scale in enumerate(scales, 1):
        rows, columns = (_squared_sums(side >> k, side) for side in (height, width))
        variance += scale**2 * rows[:, None] * columns  # bilinear weights are products of those of the two axes
    return np.sqrt(variance)


def _squared_sums(small: int, large: int) -> np.ndarray:
    """Variance (large,) of white noise (small,) after linear interpolation to `large` positions."""
    place = np.maximum((np.arange(large) + 0.5) * small / large - 0.5, 0.0)  # as F.interpolate does
    weight = place - np.floor(place)  # of the next value, except at the end
    return np.where(place < small - 1, weight**2 + (1.0 - weight) ** 2, 1.0)
