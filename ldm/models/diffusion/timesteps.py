"""Distribution of the timesteps of training steps: `timestep_config` of a diffusion model. Validation is uniform."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm import rng
from ldm.config.types import PositiveFloat
from ldm.rng import Purpose


class UniformTimesteps:
    """Timesteps uniform in [0, T); a subclass maps uniform numbers by the `quantile` of another density.

    low_discrepancy: spread those of a batch of all ranks evenly, from a random start, which reduces the variance of the
        loss (VDM, arXiv 2107.00630): t_i = (u + i / B) mod 1. Each timestep alone is distributed as without it. A
        sample's timestep then depends on the batch of all ranks that it is in, but not on the number of ranks.
    """

    def __init__(self, low_discrepancy: bool = False) -> None:
        self.low_discrepancy = low_discrepancy

    def quantile(self, u: Tensor) -> Tensor:
        """Map uniform numbers in [0, 1] to t / T in [0, 1], (B,) -> (B,)."""
        return u

    def __call__(self, batch_size: int, num_timesteps: int, device: torch.device) -> Tensor:
        """Sample timesteps (B,) int64 in [0, num_timesteps)."""
        if not self.low_discrepancy and type(self) is UniformTimesteps:
            return rng.integers(num_timesteps, batch_size, Purpose.TIMESTEP, device)
        numbers = rng.stratified if self.low_discrepancy else rng.uniform
        share = self.quantile(numbers(batch_size, Purpose.TIMESTEP, device))
        return (share * num_timesteps).long().clamp(0, num_timesteps - 1)


class LogitNormalTimesteps(UniformTimesteps):
    """Timesteps T * sigmoid(mean + std * n) with normal n (Stable Diffusion 3, arXiv 2403.03206, section 3.1).

    A negative mean prefers little noise; a smaller std concentrates on the middle.
    """

    def __init__(self, mean: float = 0.0, std: PositiveFloat = 1.0, low_discrepancy: bool = False) -> None:
        super().__init__(low_discrepancy)
        self.mean, self.std = mean, std

    def quantile(self, u: Tensor) -> Tensor:
        return (self.mean + self.std * math.sqrt(2.0) * torch.erfinv(2.0 * u - 1.0)).sigmoid()
