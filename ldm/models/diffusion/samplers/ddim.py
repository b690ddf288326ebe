"""DDIM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.samplers.base import Sampler
from ldm.models.diffusion.samplers.denoiser import DiffusionModel, SamplingOptions, SamplingRun, ScoreCorrector, Steps
from ldm.models.diffusion.samplers.spacing import model_alphas_cumprod
from ldm.modules.diffusionmodules.schedule import make_ddim_sampling_parameters, make_ddim_timesteps


def ddim_steps(model: DiffusionModel, S: int, eta: float, spacing: str) -> Steps:
    """The S timesteps of that spacing, and DDIM's noise scales (eq. 16)."""
    t = make_ddim_timesteps(spacing, S, model.num_timesteps, verbose=False)
    sigmas, alphas, alphas_prev = make_ddim_sampling_parameters(model.alphas_cumprod, t, eta, verbose=False)
    return Steps(t, alphas, alphas_prev, sigmas)


class DDIMSampler(Sampler):
    """Denoising diffusion implicit models, https://arxiv.org/abs/2010.02502."""

    takes_eta = True
    adds_noise = True
    mask_blend = "before"

    def make_steps(self, S: int, eta: float, spacing: str) -> Steps:
        return ddim_steps(self.model, S, eta, spacing)

    def step(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        alpha_prev, sigma = run.alpha_prev[k], run.sigma[k]
        eps, x0 = run.predict(x, k)  # eq. 12, "predicted x_0"
        # At eta 1, rounding can make the number under the root slightly negative.
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
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """One step of the schedule from x (B, C, H, W) at step `index` -> (x_prev, predicted x_0).

        `t` (B,) are the network's timesteps, on the schedule `ddim_timesteps[index]`; `options` are the other fields of
        `SamplingOptions`.
        """
        steps = self._steps_of(use_original_steps)
        asked = SamplingOptions(
            temperature=temperature,
            noise_dropout=noise_dropout,
            repeat_noise=repeat_noise,
            quantize_x0=quantize_denoised,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            **options,
        )
        run = SamplingRun(self.model, steps, x, c, unconditional_conditioning, unconditional_guidance_scale, asked)
        run.t = t.expand(len(steps.t), len(x))  # (S, B): the timesteps may differ between samples
        return self.step(x, index, run)

    def _encoding_alphas(self, steps: Steps) -> np.ndarray:
        # As published, one level noisier than the first step of `decode`.
        return np.concatenate([[1.0], steps.alphas[1:], [0.0]])

    def _steps_of(self, use_original_steps: bool = False) -> Steps:
        if not use_original_steps:
            return super()._steps_of()
        alphas = model_alphas_cumprod(self.model)
        prev = np.asarray(self.model.alphas_cumprod_prev.cpu(), dtype=np.float64)
        sigmas = self._eta * np.sqrt((1 - prev) / (1 - alphas) * (1 - alphas / prev))  # eq. 16
        return Steps(np.arange(len(alphas)), alphas, prev, sigmas)
