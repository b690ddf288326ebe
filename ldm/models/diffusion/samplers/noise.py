"""Where the random numbers of a sampling run come from: one stream for a batch, or one for each sample of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NoiseSource:
    """Torch's own generators: one stream for the whole batch, on the latent's device, so that a seed gives the published picture."""

    def normal(self, shape: Sequence[int], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal noise of a batch, (B, C, H, W)."""
        return torch.randn(tuple(shape), device=device, dtype=dtype)

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal noise in the shape, dtype and place of x (B, C, H, W)."""
        return torch.randn_like(x)

    def dropout(self, x: Tensor, share: float) -> Tensor:
        """x (B, C, H, W) with that share of its values set to 0 and the others enlarged to make up for it."""
        return torch.nn.functional.dropout(x, p=share)


class NoisePerSample(NoiseSource):
    """A stream for each sample, from a seed of its own: its noise is the same in every batch, at every place in it, on every device.

    Numbers are drawn on the CPU in float32 and moved, since a device's own generator gives others.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def normal(self, shape: Sequence[int], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
        noise = [torch.randn(tuple(shape[1:]), generator=g, device="cpu") for g in self._for(shape)]
        return torch.stack(noise).to(device=device, dtype=dtype)

    def normal_like(self, x: Tensor) -> Tensor:
        return self.normal(x.shape, x.device, x.dtype)

    def dropout(self, x: Tensor, share: float) -> Tensor:
        kept = [torch.rand(x.shape[1:], generator=g, device="cpu") >= share for g in self._for(x.shape)]
        return x * torch.stack(kept).to(x.device) / (1.0 - share)

    def _for(self, shape: Sequence[int]) -> list[torch.Generator]:
        if shape[0] != len(self.generators):
            raise ValueError(
                f"noise of {len(self.generators)} samples was asked for {shape[0]}: each has a stream of its own"
            )
        return self.generators


PUBLISHED_NOISE = NoiseSource()
