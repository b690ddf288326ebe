"""Learning-rate schedules as multipliers for `torch.optim.lr_scheduler.LambdaLR`: use base_lr 1.0, or the published base_lr as a factor.

All return plain Python floats, which `weights_only=True` can read back from a checkpoint (a numpy scalar cannot be).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

logger = logging.getLogger(__name__)


class CyclicSchedule:
    """Linear warm-up from f_start to f_max, then a decay from f_max to f_min that a subclass shapes, once per cycle.

    All arguments are lists with one entry per cycle; warm_up_steps and cycle_lengths are in optimizer steps. After the last cycle
    the schedule stays at its f_min. With `verbosity_interval` > 0 every so many steps are logged.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ) -> None:
        arguments = {
            "warm_up_steps": warm_up_steps,
            "f_min": f_min,
            "f_max": f_max,
            "f_start": f_start,
            "cycle_lengths": cycle_lengths,
        }
        sizes = {name: len(values) for name, values in arguments.items()}
        if len(set(sizes.values())) != 1 or not sizes["f_min"]:
            raise ValueError(f"{type(self).__name__}: expected lists of one length, one entry per cycle, got {sizes}")
        for warm_up, length in zip(warm_up_steps, cycle_lengths):
            if not 0 <= warm_up <= length:
                raise ValueError(
                    f"{type(self).__name__}: warm_up_steps {warm_up} must be between 0 and its cycle length {length}"
                )
        self.lr_warm_up_steps = [int(x) for x in warm_up_steps]
        self.f_min = [float(x) for x in f_min]
        self.f_max = [float(x) for x in f_max]
        self.f_start = [float(x) for x in f_start]
        self.cycle_lengths = [int(x) for x in cycle_lengths]
        self.verbosity_interval = verbosity_interval
        self.last_f = 0.0

    def decay(self, progress: float) -> float:
        """Share of the way from f_min to f_max that is left at `progress` in [0, 1] between the warm-up and the cycle's end."""
        raise NotImplementedError

    def schedule(self, n: int) -> float:
        """The multiplier at optimizer step n >= 0."""
        cycle, start = 0, 0
        # A cycle owns its last step too: step n = start + length still belongs to it, as published.
        while cycle < len(self.cycle_lengths) - 1 and n > start + self.cycle_lengths[cycle]:
            start += self.cycle_lengths[cycle]
            cycle += 1
        step, warm_up, length = n - start, self.lr_warm_up_steps[cycle], self.cycle_lengths[cycle]
        if step < warm_up:
            f = self.f_start[cycle] + (self.f_max[cycle] - self.f_start[cycle]) / warm_up * step
        else:
            progress = self._progress(min(step, length), warm_up, length)
            f = self.f_min[cycle] + (self.f_max[cycle] - self.f_min[cycle]) * self.decay(progress)
        self.last_f = float(f)
        if self.verbosity_interval > 0 and n % self.verbosity_interval == 0:
            logger.info("step %d, cycle %d: learning-rate multiplier %.3e", n, cycle, self.last_f)
        return self.last_f

    def _progress(self, step: int, warm_up: int, length: int) -> float:
        return (step - warm_up) / (length - warm_up) if length > warm_up else 1.0

    def __call__(self, n: int) -> float:
        return self.schedule(n)


class LambdaWarmUpCosineScheduler2(CyclicSchedule):
    """Warm-up, then half a cosine down to f_min; cycles may repeat (SGDR, arXiv 1608.03983, eq. 5)."""

    def decay(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))


class LambdaLinearScheduler(CyclicSchedule):
    """Warm-up, then a straight line that reaches f_min at the cycle's end.

    As published, the line is measured from the cycle's start and not from the end of the warm-up, so that f falls a little short of f_max.
    """

    def decay(self, progress: float) -> float:
        return 1.0 - progress

    def _progress(self, step: int, warm_up: int, length: int) -> float:
        return step / length if length else 1.0


class LambdaWarmUpCosineScheduler(LambdaWarmUpCosineScheduler2):
    """One cycle of warm-up and half a cosine from plain numbers: lr_start -> lr_max in warm_up_steps, then lr_min at max_decay_steps."""

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ) -> None:
        super().__init__([warm_up_steps], [lr_min], [lr_max], [lr_start], [max_decay_steps], verbosity_interval)
