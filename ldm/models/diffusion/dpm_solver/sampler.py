"""DPM-Solver++(2M) on a grid that is uniform in continuous time."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ldm.models.diffusion.sampler import Grid, Run, Sampler
from ldm.modules.diffusionmodules.schedule import check_steps

LOWER_ORDER_FINAL_BELOW = 15  # short runs end with a first-order step, which is more stable


class DPMSolverSampler(Sampler):
    """Second-order multistep DPM-Solver++, https://arxiv.org/abs/2211.01095 (Algorithm 2); draws no noise but x_T."""

    def grid(self, S: int, eta: float = 0.0, discretize: str = "uniform") -> Grid:
        if eta != 0:
            raise ValueError(f"DPM-Solver++ is deterministic: eta must be 0, got {eta:g}; DDIM takes any eta")
        if discretize != "uniform":
            raise ValueError(f"ddim_discretize {discretize!r}: DPM-Solver++ has the grid 'uniform' alone")
        T = self.model.num_timesteps
        check_steps(S, T)
        time = np.linspace(1.0 / T, 1.0, S + 1)  # the chain's timestep n stands at time (n + 1) / T
        log_alpha = np.interp(time, np.arange(1, T + 1) / T, 0.5 * np.log(np.asarray(self.model.alphas_cumprod.cpu(), dtype=np.float64)))
        alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
        lam = log_alpha - np.log(sigma)  # half the log signal-to-noise ratio
        h = lam[:-1] - lam[1:]
        # D = m_0 + (m_0 - m_1) / (2 r), r = h_prev / h: the first step has no m_1.
        extrapolation = np.append(h[:-1] / (2 * h[1:]), 0.0)
        if S < LOWER_ORDER_FINAL_BELOW:
            extrapolation[0] = 0.0
        coefs = {"keep": sigma[:-1] / sigma[1:], "move": -alpha[:-1] * np.expm1(-h), "extrapolation": extrapolation}
        return Grid((time - 1.0 / T)[1:] * T, alpha[1:] ** 2, alpha[:-1] ** 2, np.zeros(S), coefs)

    def step(self, x: Tensor, k: int, run: Run) -> tuple[Tensor, Tensor]:
        _, x0 = run.predict(x, k)
        slope = x0
        if run.history:
            slope = x0 + run.coefs["extrapolation"][k] * (x0 - run.history[-1])
        run.history = [x0]
        return run.coefs["keep"][k] * x + run.coefs["move"][k] * slope, x0
