"""Torch's random numbers of one run, and of single pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ldm.inference.settings import MAX_SEED

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ldm.models.diffusion.samplers.noise import NoiseSource


class Randomness:
    """Torch's random numbers of one run: seeded at its start, continued batch after batch, whatever the caller draws in between."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self._states: list[Tensor] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within it torch's generators are the run's; afterwards they are the caller's again."""
        import torch

        from ldm.rng import set_torch_states, torch_generators_kept, torch_states

        with torch_generators_kept(self.device):
            if self._states is None:
                torch.manual_seed(self.seed)  # of every device, as seed_everything does
            else:
                set_torch_states(self._states, self.device)
            yield
            self._states = torch_states(self.device)


def noise_of(seed_mode: str, seed: int, places: Sequence[int]) -> NoiseSource:
    """The noise of the pictures at some places of a run: torch's own stream or, in mode `image`, one for each from seed + place."""
    from ldm.models.diffusion.samplers.noise import PUBLISHED_NOISE, NoisePerSample

    if seed_mode == "batch":
        return PUBLISHED_NOISE
    return NoisePerSample([(seed + place) % (MAX_SEED + 1) for place in places])


class Silent:
    """A model whose network costs nothing and says nothing, for what else a sampler does: using up the random numbers of a batch."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def apply_model(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        import torch

        return torch.zeros_like(x)
