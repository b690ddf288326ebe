"""Sampling of latent consistency models, which predict the clean latent from any noise level."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ldm.models.diffusion.samplers.base import Sampler
from ldm.models.diffusion.samplers.denoiser import DiffusionModel, SamplingRun, Steps
from ldm.models.diffusion.samplers.spacing import model_alphas_cumprod
from ldm.modules.diffusionmodules.schedule import make_ddim_timesteps


class LCMSampler(Sampler):
    """Multistep latent consistency sampling, https://arxiv.org/abs/2310.04378 (Algorithm 3).

    original_steps: number of timesteps of the distillation, from which a run takes S (None: 50, or all if fewer).
    sigma_data, timestep_scaling: of the boundary condition, f(x, t) = c_skip(t) x + c_out(t) x_0 with f(x, 0) = x.
    """

    spacings = ("uniform", "trailing")
    default_eta = 1.0
    adds_noise = True

    def __init__(
        self,
        model: DiffusionModel,
        schedule: str = "linear",
        original_steps: int | None = None,
        sigma_data: float = 0.5,
        timestep_scaling: float = 10.0,
    ) -> None:
        super().__init__(model, schedule)
        original_steps = min(50, model.num_timesteps) if original_steps is None else original_steps
        if not 1 <= original_steps <= model.num_timesteps:
            raise ValueError(
                f"original_steps {original_steps}: choose 1 to {model.num_timesteps}, the model's timesteps"
            )
        self.original_steps, self.sigma_data, self.timestep_scaling = original_steps, sigma_data, timestep_scaling

    def make_steps(self, S: int, eta: float, spacing: str) -> Steps:
        count = S if spacing == "trailing" else max(S, self.original_steps)
        t = make_ddim_timesteps("trailing", count, self.model.num_timesteps, verbose=False)
        t = t[::-1][np.arange(S) * count // S][::-1].copy()
        alphas = model_alphas_cumprod(self.model)[t]
        alphas_prev = np.append(1.0, alphas[:-1])
        scaled = t * self.timestep_scaling
        c_skip = self.sigma_data**2 / (scaled**2 + self.sigma_data**2)  # as in the released code
        c_out = scaled / np.sqrt(scaled**2 + self.sigma_data**2)
        return Steps(t, alphas, alphas_prev, np.sqrt(1 - alphas_prev), {"c_skip": c_skip, "c_out": c_out})

    def step(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        _, x0 = run.predict(x, k)
        clean = run.coefs["c_skip"][k] * x + run.coefs["c_out"][k] * x0
        return run.signal_prev[k] * clean + run.sigma[k] * run.noise(x), clean
