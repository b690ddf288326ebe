"""Torch's random numbers of one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Randomness:
    """Torch's random numbers of one run: seeded at its start, continued batch after batch, whatever the caller draws in between."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self._states: list[Tensor] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within it torch's generators are the run's; afterwards they are the caller's again."""
        import torch

        outside = self._read()
        if self._states is None:
            torch.manual_seed(self.seed)                                    # of every device, as seed_everything does
        else:
            self._write(self._states)
        try:
            yield
            self._states = self._read()
        finally:
            self._write(outside)

    def _read(self) -> list[Tensor]:
        import torch

        states = [torch.get_rng_state()]
        if self.device.type != "cpu":
            states.append(getattr(torch, self.device.type).get_rng_state(self.device))
        return states

    def _write(self, states: Sequence[Tensor]) -> None:
        import torch

        torch.set_rng_state(states[0])
        if self.device.type != "cpu":
            getattr(torch, self.device.type).set_rng_state(states[1], self.device)
