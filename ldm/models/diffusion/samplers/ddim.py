"""DDIM."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.samplers.base import Sampler
from ldm.models.diffusion.samplers.denoiser import Grid, Options, Run
from ldm.modules.diffusionmodules.schedule import make_ddim_sampling_parameters, make_ddim_timesteps


class DDIMSampler(Sampler):
    """Denoising diffusion implicit models, https://arxiv.org/abs/2010.02502."""

    takes_eta = True
    adds_noise = True
    mask_blend = "before"

    def make_grid(self, S: int, eta: float, discretize: str) -> Grid:
        t = make_ddim_timesteps(discretize, S, self.model.num_timesteps, verbose=False)
        sigmas, alphas, alphas_prev = make_ddim_sampling_parameters(self.model.alphas_cumprod, t, eta, verbose=False)
        return Grid(t, alphas, alphas_prev, sigmas)

    def step(self, x: Tensor, k: int, run: Run) -> tuple[Tensor, Tensor]:
        alpha_prev, sigma = run.alpha_prev[k], run.sigma[k]
        eps, x0 = run.predict(x, k)  # eq. 12, "predicted x_0"
        # Rounding can leave a tiny negative number under the root where eta is 1.
        direction = (1.0 - alpha_prev - sigma**2).clamp(min=0.0).sqrt() * eps  # eq. 12, "direction pointing to x_t"
        return alpha_prev.sqrt() * x0 + direction + sigma * run.noise(x), x0

    @torch.no_grad()
    def p_sample_ddim(
        self,
        x: Tensor,
        c: Conditioning,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
    ) -> tuple[Tensor, Tensor]:
        """One step of the schedule: x (B, C, H, W) at step `index` -> (x_prev, predicted x_0).

        `t` (B,) is what the network is given; on the schedule's own grid it is `ddim_timesteps[index]`.
        """
        options = Options(
            temperature, noise_dropout, repeat_noise, quantize_denoised, False, score_corrector, corrector_kwargs or {}
        )
        grid = self._grid_of(use_original_steps)
        run = Run(self.model, grid, x, c, unconditional_conditioning, unconditional_guidance_scale, options)
        run.t = t.expand(len(grid.t), len(x))  # (S, B): this step's time, which may differ between samples
        return self.step(x, index, run)

    def _encoding_alphas(self, grid: Grid) -> np.ndarray:
        # As published, one level noisier than the step that is walked first.
        return np.concatenate([[1.0], grid.alphas[1:], [0.0]])

    def _grid_of(self, use_original_steps: bool) -> Grid:
        if not use_original_steps:
            return super()._grid_of(False)
        alphas = np.asarray(self.model.alphas_cumprod.cpu(), dtype=np.float64)
        prev = np.asarray(self.model.alphas_cumprod_prev.cpu(), dtype=np.float64)
        sigmas = self._eta * np.sqrt((1 - prev) / (1 - alphas) * (1 - alphas / prev))
        return Grid(np.arange(len(alphas)), alphas, prev, sigmas)
