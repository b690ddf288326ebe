"""Learning-rate schedules: multipliers for `torch.optim.lr_scheduler.LambdaLR`.

They return Python floats, because `weights_only=True` cannot load a numpy scalar from a checkpoint.
"""

import logging
import math
from collections.abc import Sequence
from typing import Annotated

logger = logging.getLogger(__name__)

Multiplier = Annotated[float, ">= 0"]


class CyclicSchedule:
    """Cycles of a linear warm-up from f_start to f_max and a decay to f_min, with the subclass's `decay` as its shape.

    The lists have one entry per cycle; warm_up_steps and cycle_lengths are in optimizer steps. After the last cycle the
    multiplier stays at its f_min. verbosity_interval: number of steps between log lines; 0 disables them.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[Multiplier],
        f_max: Sequence[Multiplier],
        f_start: Sequence[Multiplier],
        cycle_lengths: Sequence[int],
        verbosity_interval: Annotated[int, ">= 0"] = 0,
    ) -> None:
        lists = {"warm_up_steps": warm_up_steps, "f_min": f_min, "f_max": f_max, "f_start": f_start}
        lengths = {name: len(values) for name, values in {**lists, "cycle_lengths": cycle_lengths}.items()}
        if len(set(lengths.values())) != 1 or not lengths["f_min"]:
            raise ValueError(f"{type(self).__name__}: expected lists of one length, one entry per cycle, got {lengths}")
        for warm_up, length in zip(warm_up_steps, cycle_lengths):
            if not 0 <= warm_up <= length:
                raise ValueError(
                    f"{type(self).__name__}: warm_up_steps {warm_up} must be between 0 and its cycle length {length}"
                )
        self.lr_warm_up_steps = [int(x) for x in warm_up_steps]
        self.f_min, self.f_max, self.f_start = ([float(x) for x in values] for values in (f_min, f_max, f_start))
        self.cycle_lengths = [int(x) for x in cycle_lengths]
        self.verbosity_interval = verbosity_interval
        self.last_f = 0.0

    def decay(self, progress: float) -> float:
        """Return a factor from 1 at progress 0 (f_max) to 0 at progress 1 (f_min)."""
        raise NotImplementedError

    def schedule(self, n: int) -> float:
        """Return the multiplier at optimizer step n >= 0."""
        cycle, start = 0, 0
        # As published, step n = start + length still belongs to the earlier cycle.
        while cycle < len(self.cycle_lengths) - 1 and n > start + self.cycle_lengths[cycle]:
            start += self.cycle_lengths[cycle]
            cycle += 1
        step, warm_up, length = n - start, self.lr_warm_up_steps[cycle], self.cycle_lengths[cycle]
        f_min, f_max, f_start = self.f_min[cycle], self.f_max[cycle], self.f_start[cycle]
        if step < warm_up:
            f = f_start + (f_max - f_start) / warm_up * step
        else:
            f = f_min + (f_max - f_min) * self.decay(self._progress(min(step, length), warm_up, length))
        self.last_f = float(f)
        if self.verbosity_interval > 0 and n % self.verbosity_interval == 0:
            logger.info("step %d, cycle %d: learning-rate multiplier %.3e", n, cycle, self.last_f)
        return self.last_f

    def _progress(self, step: int, warm_up: int, length: int) -> float:
        return (step - warm_up) / (length - warm_up) if length > warm_up else 1.0

    __call__ = schedule


class LambdaWarmUpCosineScheduler2(CyclicSchedule):
    """Warm-up, then half a cosine, in cycles (SGDR, arXiv 1608.03983, eq. 5)."""

    def decay(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))


class LambdaLinearScheduler(CyclicSchedule):
    """Warm-up, then a linear decay. As published, the decay counts from the cycle's start, so it begins below f_max."""

    def decay(self, progress: float) -> float:
        return 1.0 - progress

    def _progress(self, step: int, warm_up: int, length: int) -> float:
        return step / length if length else 1.0


class LambdaWarmUpCosineScheduler(LambdaWarmUpCosineScheduler2):
    """One cycle: linear from lr_start to lr_max in warm_up_steps, then half a cosine to lr_min at max_decay_steps."""

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: Multiplier,
        lr_max: Multiplier,
        lr_start: Multiplier,
        max_decay_steps: int,
        verbosity_interval: Annotated[int, ">= 0"] = 0,
    ) -> None:
        super().__init__([warm_up_steps], [lr_min], [lr_max], [lr_start], [max_decay_steps], verbosity_interval)
