"""PLMS: linear multistep on DDIM's steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.samplers.base import Sampler
from ldm.models.diffusion.samplers.ddim import ddim_steps, published_arguments
from ldm.models.diffusion.samplers.denoiser import SamplingRun, ScoreCorrector, Steps
from ldm.models.diffusion.samplers.published import PublishedSampler, sampling_options


class PLMSSampler(Sampler):
    """Pseudo linear multistep, https://arxiv.org/abs/2202.09778 (Algorithm 2, its first step a Heun step)."""

    mask_blend = "before"
    published_loop = "plms_sampling"
    plms_sampling = PublishedSampler.sampling_loop

    def make_steps(self, S: int, eta: float, spacing: str) -> Steps:
        return ddim_steps(self.model, S, eta, spacing)

    def step(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        if self.overrides("p_sample_plms", PLMSSampler.p_sample_plms):  # research code replaces the published step
            t, t_next = run.t[k], run.t[max(k - 1, 0)]
            x, x0, eps = self.p_sample_plms(
                x, run.cond, t, index=k, old_eps=run.history, t_next=t_next, **published_arguments(self, run)
            )
            run.history = [*run.history, eps][-3:]
            return x, x0
        return self.multistep(x, k, run)

    def multistep(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        if run.starts_from_noise(k):  # `transfer` divides by alpha: take an Euler step and start the history after it
            eps, x0 = run.predict(x, k)
            return run.signal_prev[k] * x0 + run.noise_level_prev[k] * eps, x0
        eps = run.predict_eps(x, k)
        match run.history:
            case []:  # Heun: average with the noise after an Euler step
                x_euler, _ = self.transfer(x, eps, k, run)
                eps_next = run.predict_eps(x_euler, max(k - 1, 0))
                slope = (eps + eps_next) / 2
            case [a]:
                slope = (3 * eps - a) / 2  # Adams-Bashforth, orders 2 to 4 (eq. 9)
            case [b, a]:
                slope = (23 * eps - 16 * a + 5 * b) / 12
            case [c, b, a]:
                slope = (55 * eps - 59 * a + 37 * b - 9 * c) / 24
        run.history = [*run.history, eps][-3:]
        return self.transfer(x, slope, k, run)

    def transfer(self, x: Tensor, eps: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        """DDIM's step with a given noise (eq. 11) -> (x_prev, predicted x_0)."""
        x0 = run.refine((x - run.noise_level[k] * eps) / run.signal[k])
        run.noise(x)  # its scale is 0; generated so that a seed gives the published image
        return run.signal_prev[k] * x0 + run.noise_level_prev[k] * eps, x0

    @torch.no_grad()
    def p_sample_plms(
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
        old_eps: Sequence[Tensor] | None = None,
        t_next: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the schedule from x (B, C, H, W) at step `index` -> (x_prev, predicted x_0, predicted noise).

        `t` (B,) are the network's timesteps, on the schedule `ddim_timesteps[index]`, and `t_next` those of the next
        step; `old_eps` are the predicted noises of up to three steps before, the newest last. PLMS adds no noise.
        """
        steps = self._steps_of(use_original_steps)
        asked = sampling_options(
            type(self).__name__,
            quantize_x0=quantize_denoised,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            **options,
        )
        run = SamplingRun(self.model, steps, x, c, unconditional_conditioning, unconditional_guidance_scale, asked)
        run.history = list(old_eps or ())[-3:]
        run.t = run.t.clone()  # (S, B): the timesteps may differ between samples
        run.t[index] = t
        if t_next is not None and index > 0:
            run.t[index - 1] = t_next
        x_prev, x0 = self.multistep(x, index, run)
        return x_prev, x0, run.history[-1] if run.history else x  # in pure noise the noise is x itself
