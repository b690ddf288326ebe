"""Sources of a sampling run's random numbers: one stream for the batch, or one for each sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NoiseSource:
    """Torch's global generator of the latent's device, one stream for the batch: a seed gives the published image."""

    def normal(self, shape: Sequence[int], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal noise of `shape` (B, C, H, W)."""
        return torch.randn(tuple(shape), device=device, dtype=dtype)

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal noise of the shape, dtype and device of x (B, C, H, W)."""
        return torch.randn_like(x)

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """Zero each value of x (B, C, H, W) with probability p and divide the others by 1 - p."""
        return torch.nn.functional.dropout(x, p=p)


class NoisePerSample(NoiseSource):
    """One seeded stream per sample: its noise is the same in every batch, at every index and on every device.

    Values are generated on the CPU in float32 and moved, since each device's own generator returns different ones.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def normal(self, shape: Sequence[int], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
        self._check_batch(shape)
        noise = [torch.randn(tuple(shape[1:]), generator=g, device="cpu") for g in self.generators]
        return torch.stack(noise).to(device=device, dtype=dtype)

    def normal_like(self, x: Tensor) -> Tensor:
        return self.normal(x.shape, x.device, x.dtype)

    def dropout(self, x: Tensor, p: float) -> Tensor:
        self._check_batch(x.shape)
        kept = [torch.rand(x.shape[1:], generator=g, device="cpu") >= p for g in self.generators]
        return x * torch.stack(kept).to(x.device) / (1.0 - p)

    def _check_batch(self, shape: Sequence[int]) -> None:
        if shape[0] != len(self.generators):
            raise ValueError(f"noise for a batch of {shape[0]}: there are seeds for {len(self.generators)} samples")


PUBLISHED_NOISE = NoiseSource()
