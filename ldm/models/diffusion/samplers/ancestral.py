"""DDPM's ancestral sampler, over all timesteps or over a subset of them."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ldm.models.diffusion.samplers.base import Sampler
from ldm.models.diffusion.samplers.denoiser import SamplingRun, Steps
from ldm.models.diffusion.samplers.spacing import model_alphas_cumprod
from ldm.modules.diffusionmodules.schedule import Schedule, make_ddim_timesteps


class AncestralSampler(Sampler):
    """Denoising diffusion probabilistic models, https://arxiv.org/abs/2006.11239 (Algorithm 2).

    Fewer steps than timesteps use the schedule of these timesteps alone (arXiv 2102.09672, section 4). The model's
    `v_posterior` mixes the reverse variance; without it, it is the true posterior's.
    """

    default_eta = 1.0
    adds_noise = True
    mask_blend = "after"

    def make_steps(self, S: int, eta: float, spacing: str) -> Steps:
        t = make_ddim_timesteps(spacing, S, self.model.num_timesteps, verbose=False)
        alphas = model_alphas_cumprod(self.model)[t]
        betas = 1 - alphas / np.append(1.0, alphas[:-1])
        if self.model.num_timesteps == S:
            betas = np.asarray(self.model.betas.cpu(), dtype=np.float64)
        v_posterior = getattr(self.model, "v_posterior", 0.0)
        tables = Schedule(betas, v_posterior, zero_terminal_snr=alphas[-1] == 0.0).tables()
        sigmas = np.exp(0.5 * tables["posterior_log_variance_clipped"])
        sigmas[0] = 0.0  # the last step adds no noise
        coefs = {"mean_x0": tables["posterior_mean_coef1"], "mean_xt": tables["posterior_mean_coef2"]}
        return Steps(t, tables["alphas_cumprod"], tables["alphas_cumprod_prev"], sigmas, coefs)

    def step(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        _, x0 = run.predict(x, k)
        mean = run.coefs["mean_x0"][k] * x0 + run.coefs["mean_xt"][k] * x  # eq. 7
        return mean + run.sigma[k] * run.noise(x), x0
