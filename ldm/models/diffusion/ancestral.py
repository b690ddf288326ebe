"""The ancestral loop of DDPM, over every timestep of the chain."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ldm.models.diffusion.sampler import Grid, Run, Sampler
from ldm.modules.diffusionmodules.schedule import Schedule


class AncestralSampler(Sampler):
    """Denoising diffusion probabilistic models, https://arxiv.org/abs/2006.11239 (Algorithm 2)."""

    blends_mask_after_step = True

    def grid(self, S: int, eta: float = 1.0, discretize: str = "uniform") -> Grid:
        T = self.model.num_timesteps
        if S != T:
            raise ValueError(f"ancestral sampling visits all {T} timesteps: S must be {T}, got {S}; DDIM takes fewer")
        betas = np.asarray(self.model.betas.cpu(), dtype=np.float64)
        tables = Schedule.from_betas(betas, getattr(self.model, "v_posterior", 0.0)).tables()
        sigmas = np.exp(0.5 * tables["posterior_log_variance_clipped"])
        sigmas[0] = 0.0  # the last step of the chain adds no noise
        coefs = {"mean_x0": tables["posterior_mean_coef1"], "mean_xt": tables["posterior_mean_coef2"]}
        return Grid(np.arange(T), tables["alphas_cumprod"], tables["alphas_cumprod_prev"], sigmas, coefs)

    def step(self, x: Tensor, k: int, run: Run) -> tuple[Tensor, Tensor]:
        _, x0 = run.predict(x, k)
        mean = run.coefs["mean_x0"][k] * x0 + run.coefs["mean_xt"][k] * x  # eq. 7
        return mean + run.sigma[k] * run.noise(x), x0
