"""Every sampler runs with every step count up to the schedule's length, and refuses others before the network runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ldm.models.diffusion.samplers.registry import SAMPLERS, make_sampler
from tests.models.diffusion.samplers.toy import ToyModel

MORE_CALLS = ("plms", "heun")  # they evaluate the network more than once at some timesteps
T = 1000


class Clock(ToyModel):
    """A network of one multiplication that records its timesteps."""

    def __init__(self, timesteps: int = T) -> None:
        super().__init__(timesteps=timesteps)
        self.times: list[Tensor] = []

    def apply_model(self, x: Tensor, t: Tensor, c: None) -> Tensor:
        self.times.append(t)
        return 0.5 * x


def check(name: str, counts: Iterable[int] = range(1, T + 1), clock: Clock | None = None) -> Iterator[int]:
    """Sample in each number of steps; AssertionError unless there are as many decreasing timesteps."""
    clock = clock or Clock()
    sampler = make_sampler(name, clock)
    for count in counts:
        clock.times.clear()
        made: list[int] = []
        x, _ = sampler.sample(count, 1, (1, 1, 1), callback=made.append, log_every_t=count + 1, verbose=False)
        times = torch.cat(clock.times)
        if name in MORE_CALLS:
            times = times.unique().flip(0)
        assert torch.isfinite(x).all(), f"{name}, {count} steps: the sample is not finite"
        assert made == list(range(count)), f"{name}, {count} steps: {len(made)} were run"
        assert len(times) == count, f"{name}, {count} steps: the network ran at {len(times)} timesteps"
        assert (times.diff() < 0).all() and times[-1] >= 0 and times[0] < clock.num_timesteps, (
            f"{name}, {count} steps: times {times}"
        )
        yield count


def check_refused(name: str, counts: Iterable[int] = (-1000, -1, 0, T + 1, 10 * T)) -> Iterator[int]:
    """Raise AssertionError unless the sampler refuses these numbers of steps before the network runs."""
    clock = Clock()
    for count in counts:
        try:
            make_sampler(name, clock).sample(count, 1, (1, 1, 1), verbose=False)
        except ValueError as error:
            assert f"choose 1 to {T}" in str(error), error
        else:
            raise AssertionError(f"{name}, {count} steps: not refused")
        assert not clock.times
        yield count


def run(names: Iterable[str] = SAMPLERS) -> Iterator[str]:
    """Yield one line per sampler."""
    clock = Clock()
    for name in names:
        done = sum(1 for _ in check(name, clock=clock))
        refused = sum(1 for _ in check_refused(name))
        yield f"{name}: {done} of {T} step counts run exactly, {refused} others refused"
