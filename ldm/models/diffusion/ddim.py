"""DDIM, with the published methods for image-to-image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.sampler import Grid, Options, Run, Sampler
from ldm.modules.diffusionmodules.schedule import make_ddim_sampling_parameters, make_ddim_timesteps


class DDIMSampler(Sampler):
    """Denoising diffusion implicit models, https://arxiv.org/abs/2010.02502."""

    def __init__(self, model: Any, schedule: str = "linear") -> None:
        super().__init__(model, schedule)
        self._scheduled: Grid | None = None
        self._eta = 0.0

    def grid(self, S: int, eta: float = 0.0, discretize: str = "uniform") -> Grid:
        t = make_ddim_timesteps(discretize, S, self.model.num_timesteps, verbose=False)
        sigmas, alphas, alphas_prev = make_ddim_sampling_parameters(self.model.alphas_cumprod, t, eta, verbose=False)
        return Grid(t, alphas, alphas_prev, sigmas)

    def step(self, x: Tensor, k: int, run: Run) -> tuple[Tensor, Tensor]:
        alpha_prev, sigma = run.alpha_prev[k], run.sigma[k]
        eps, x0 = run.predict(x, k)  # eq. 12, "predicted x_0"
        # Rounding can leave a tiny negative number under the root where eta is 1.
        direction = (1.0 - alpha_prev - sigma**2).clamp(min=0.0).sqrt() * eps  # eq. 12, "direction pointing to x_t"
        return alpha_prev.sqrt() * x0 + direction + sigma * run.noise(x), x0

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Fix the steps that `stochastic_encode`, `decode` and `p_sample_ddim` use, and the `ddim_*` tables."""
        self._scheduled, self._eta = self.grid(ddim_num_steps, ddim_eta, ddim_discretize), ddim_eta

    @property
    def ddim_timesteps(self) -> np.ndarray:
        """(S,) int64, increasing."""
        return self._grid_of(False).t

    @property
    def ddim_alphas(self) -> Tensor:
        """(S,) products of (1 - beta) at each step."""
        return torch.as_tensor(self._grid_of(False).alphas, dtype=torch.float32, device=self.model.device)

    @property
    def ddim_alphas_prev(self) -> np.ndarray:
        """(S,) products of (1 - beta) at the step that each one leads to."""
        return self._grid_of(False).alphas_prev

    @property
    def ddim_sigmas(self) -> Tensor:
        """(S,) noise scale of each step."""
        return torch.as_tensor(self._grid_of(False).sigmas, dtype=torch.float32, device=self.model.device)

    @torch.no_grad()
    def stochastic_encode(self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None) -> Tensor:
        """x0 (B, C, H, W) brought to the noise level of step t (B,), counted on the schedule's grid, 0 to S.

        At S, which strength 1 asks for, the result is pure noise.
        """
        alphas = np.append(self._grid_of(use_original_steps).alphas, 0.0)
        if int(t.min()) < 0 or int(t.max()) >= len(alphas):
            raise ValueError(f"encoding step {t.tolist()}: choose 0 to {len(alphas) - 1}")
        alpha = torch.as_tensor(alphas, dtype=torch.float32, device=x0.device)[t][:, None, None, None]
        noise = torch.randn_like(x0) if noise is None else noise
        return alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Conditioning,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
        verbose: bool = True,
    ) -> Tensor:
        """Denoise a latent (B, C, H, W) over the last `t_start` steps of the schedule's grid."""
        grid = self._grid_of(use_original_steps)
        if not 0 <= t_start <= len(grid.t):
            raise ValueError(f"t_start {t_start}: choose 0 to {len(grid.t)}")
        run = Run(self.model, grid, x_latent, cond, unconditional_conditioning, unconditional_guidance_scale, Options())
        return self.loop(x_latent, run, t_start, callback=callback, verbose=verbose).samples

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
        options = Options(temperature, noise_dropout, repeat_noise, quantize_denoised, False, score_corrector, corrector_kwargs or {})
        grid = self._grid_of(use_original_steps)
        run = Run(self.model, grid, x, c, unconditional_conditioning, unconditional_guidance_scale, options)
        run.t = run.t.clone().to(t.dtype)
        run.t[index] = t[0]
        return self.step(x, index, run)

    def _grid_of(self, use_original_steps: bool) -> Grid:
        if use_original_steps:
            alphas = np.asarray(self.model.alphas_cumprod.cpu(), dtype=np.float64)
            prev = np.asarray(self.model.alphas_cumprod_prev.cpu(), dtype=np.float64)
            sigmas = self._eta * np.sqrt((1 - prev) / (1 - alphas) * (1 - alphas / prev))
            return Grid(np.arange(len(alphas)), alphas, prev, sigmas)
        if self._scheduled is None:
            raise ValueError("call make_schedule(ddim_num_steps=...) first")
        return self._scheduled
