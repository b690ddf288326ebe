"""DPM-Solver++ of orders 1 to 3, multistep and single-step."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ldm.models.diffusion.samplers.base import Sampler
from ldm.models.diffusion.samplers.denoiser import Grid, Run
from ldm.models.diffusion.samplers.dpm_solver.tables import multistep_tables, singlestep_tables
from ldm.models.diffusion.samplers.spacing import CONTINUOUS_GRIDS, chain_alphas, levels_down_to_first

METHODS = ("multistep", "singlestep")
ORDERS = (1, 2, 3)
LOWER_ORDER_FINAL_BELOW = 15  # short multistep runs end with steps of lower order, which is more stable


class DPMSolverSampler(Sampler):
    """DPM-Solver++, https://arxiv.org/abs/2211.01095 (Algorithm 2 is order 2 multistep, Algorithm 1 single-step); draws no noise but x_T.

    A step is one network call: the S levels of a single-step run are shared out to blocks of `order` calls, the last ones shorter.
    """

    grids = CONTINUOUS_GRIDS

    def __init__(self, model: Any, schedule: str = "linear", order: int = 2, method: str = "multistep") -> None:
        super().__init__(model, schedule)
        if order not in ORDERS:
            raise ValueError(
                f"order {order}: choose one of {', '.join(map(str, ORDERS))}; 2 is usual with guidance, 3 without"
            )
        if method not in METHODS:
            raise ValueError(f"method {method!r}: choose one of {', '.join(METHODS)}")
        self.order, self.method = order, method

    def make_grid(self, S: int, eta: float, discretize: str) -> Grid:
        levels = levels_down_to_first(discretize, S, chain_alphas(self.model))
        tables = multistep_tables(levels) if self.method == "multistep" else singlestep_tables(levels, self.order)
        return Grid(levels.t, levels.alphas[1:], levels.alphas[:-1], np.zeros(S), tables)

    def step(self, x: Tensor, k: int, run: Run) -> tuple[Tensor, Tensor]:
        return self.multistep(x, k, run) if self.method == "multistep" else self.singlestep(x, k, run)

    def multistep(self, x: Tensor, k: int, run: Run) -> tuple[Tensor, Tensor]:
        """Order 1 to 3 with the predictions of the steps before, newest first in the history."""
        _, x0 = run.predict(x, k)
        coefs, recent = run.coefs, [x0, *run.history]
        order = min(self.order, len(recent), k + 1 if len(run.t) < LOWER_ORDER_FINAL_BELOW else self.order)
        x_prev = coefs["keep"][k] * x + coefs["move"][k] * x0
        if order == 2:
            x_prev = x_prev + coefs["second"][k] * (x0 - recent[1])
        elif order == 3:
            x_prev = x_prev + coefs["third_new"][k] * (x0 - recent[1]) + coefs["third_old"][k] * (recent[1] - recent[2])
        run.history = [] if run.starts_from_noise(k) else recent[: self.order - 1]
        return x_prev, x0

    def singlestep(self, x: Tensor, k: int, run: Run) -> tuple[Tensor, Tensor]:
        """One stage of a block: from the block's start x_s to the next level, with the predictions at x_s and at x."""
        _, x0 = run.predict(x, k)
        coefs, stage = run.coefs, int(run.grid.coefs["stage"][k])
        if stage > 0 and not run.history:  # an image-to-image run that began within a block: order 1 to the block's end
            return coefs["keep"][k] * x + coefs["move"][k] * x0, x0
        if stage == 0:
            run.history = [x, x0]
        x_s, x0_s = run.history
        return coefs["keep_s"][k] * x_s + coefs["move_s"][k] * x0_s + coefs["correct"][k] * (x0 - x0_s), x0
