"""Random numbers of a run and of single images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ldm.inference.settings import MAX_SEED
from ldm.models.diffusion.samplers.noise import PUBLISHED_NOISE, NoisePerSample, NoiseSource
from ldm.rng import preserve_torch_rng, set_torch_states, torch_states


class Randomness:
    """Torch's random state of a run: seeded at its start, continued batch after batch, independent of the caller's."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self._states: list[Tensor] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Set torch's generators to the run's state; restore the caller's afterwards."""
        with preserve_torch_rng(self.device):
            if self._states is None:
                torch.manual_seed(self.seed)  # of every device, as seed_everything does
            else:
                set_torch_states(self._states, self.device)
            yield
            self._states = torch_states(self.device)


def noise_of(seed_mode: str, seed: int, indices: Sequence[int]) -> NoiseSource:
    """Noise of the images with these indices: torch's own stream, or in mode `image` one each from seed + index."""
    if seed_mode == "batch":
        return PUBLISHED_NOISE
    return NoisePerSample([(seed + index) % (MAX_SEED + 1) for index in indices])


class SilentModel:
    """Stub without a network: a sampler with it advances the generators exactly as a skipped batch would."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def apply_model(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return torch.zeros_like(x)
