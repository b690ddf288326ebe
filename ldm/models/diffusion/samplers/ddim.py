"""DDIM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.samplers.base import Sampler
from ldm.models.diffusion.samplers.denoiser import DiffusionModel, SamplingOptions, SamplingRun, ScoreCorrector, Steps
from ldm.models.diffusion.samplers.published import PublishedSampler, sampling_options
from ldm.models.diffusion.samplers.spacing import model_alphas_cumprod
from ldm.modules.diffusionmodules.schedule import make_ddim_sampling_parameters, make_ddim_timesteps


def ddim_steps(model: DiffusionModel, S: int, eta: float, spacing: str) -> Steps:
    """The S timesteps of that spacing, and DDIM's noise scales (eq. 16)."""
    t = make_ddim_timesteps(spacing, S, model.num_timesteps, verbose=False)
    alphas_cumprod = model_alphas_cumprod(model)
    sigmas, alphas, alphas_prev = make_ddim_sampling_parameters(alphas_cumprod, t, eta, verbose=False)
    return Steps(t, alphas, alphas_prev, sigmas, _direction(alphas_prev, sigmas))


def _direction(alphas_prev: np.ndarray, sigmas: np.ndarray) -> dict[str, np.ndarray]:
    """Scale of eq. 12, "direction pointing to x_t", sqrt(1 - alpha_prev - sigma^2), in float32 as published."""
    alpha_prev, sigma = alphas_prev.astype(np.float32), sigmas.astype(np.float32)
    # At eta 1, rounding can make the number under the root slightly negative.
    return {"direction": np.sqrt(np.maximum(1 - alpha_prev - sigma**2, 0.0))}


def published_arguments(sampler: Sampler, run: SamplingRun) -> dict[str, Any]:
    """Arguments of the published steps `p_sample_ddim` and `p_sample_plms` after x, c, t and index.

    Options that they do not have in the published code are passed only if they are set.
    """
    defaults = SamplingOptions()
    ours = (
        "guidance_rescale",
        "guidance_interval",
        "dynamic_threshold",
        "clip_denoised",
        "repeat_noise",
        "noise_source",
    )
    set_here = {name: getattr(run.options, name) for name in ours}
    return {
        **{name: value for name, value in set_here.items() if value != getattr(defaults, name)},
        "use_original_steps": run.steps is not sampler._scheduled,
        "quantize_denoised": run.options.quantize_x0,
        "temperature": run.options.temperature,
        "noise_dropout": run.options.noise_dropout,
        "score_corrector": run.options.score_corrector,
        "corrector_kwargs": run.options.corrector_kwargs,
        "unconditional_guidance_scale": run.scale,
        "unconditional_conditioning": run.uncond,
    }


class DDIMSampler(Sampler):
    """Denoising diffusion implicit models, https://arxiv.org/abs/2010.02502."""

    takes_eta = True
    adds_noise = True
    mask_blend = "before"
    published_loop = "ddim_sampling"
    ddim_sampling = PublishedSampler.sampling_loop

    def make_steps(self, S: int, eta: float, spacing: str) -> Steps:
        return ddim_steps(self.model, S, eta, spacing)

    def step(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        if self.overrides("p_sample_ddim", DDIMSampler.p_sample_ddim):  # research code replaces the published step
            return self.p_sample_ddim(x, run.cond, run.t[k], index=k, **published_arguments(self, run))
        return self.transfer(x, k, run)

    def transfer(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        eps, x0 = run.predict(x, k)  # eq. 12, "predicted x_0"
        return run.signal_prev[k] * x0 + run.coefs["direction"][k] * eps + run.sigma[k] * run.noise(x), x0

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
        asked = sampling_options(
            type(self).__name__,
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
        return self.transfer(x, index, run)

    @torch.no_grad()
    def encode(
        self,
        x0: Tensor,
        c: Conditioning,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        callback: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """DDIM inversion: the latent from which `decode` at eta 0 with t_start = `t_enc` returns to x0 (B, C, H, W).

        Also returns {"x_encoded", "intermediate_steps", "intermediates"}, of about `return_intermediates` latents on
        the way. (arXiv 2105.05233, appendix F: DDIM's step in reverse, with the noise at its start.)
        """
        steps = self._steps_of(use_original_steps)
        if not 0 <= t_enc <= len(steps.t):
            raise ValueError(f"t_enc {t_enc}: choose 0 to {len(steps.t)}")
        run = self._start(steps, x0, c, unconditional_guidance_scale, unconditional_conditioning, SamplingOptions())
        every, kept, x = max(1, t_enc // (return_intermediates or 1)), {}, x0
        for k in range(t_enc):
            eps, _ = run.predict(x, k)
            pred_x0 = (x - run.noise_level_prev[k] * eps) / run.signal_prev[k]
            x = run.signal[k] * pred_x0 + run.noise_level[k] * eps
            if return_intermediates and (k % every == 0 or k >= t_enc - 2):
                kept[k] = x
            if callback is not None:
                callback(k)
        return x, {"x_encoded": x, "intermediate_steps": list(kept), "intermediates": list(kept.values())}

    def _encoding_alphas(self, steps: Steps) -> np.ndarray:
        # As published, one level noisier than the first step of `decode`.
        return np.concatenate([[1.0], steps.alphas[1:], [0.0]])

    def _steps_of(self, use_original_steps: bool = False) -> Steps:
        if not use_original_steps:
            return super()._steps_of()
        alphas = model_alphas_cumprod(self.model)
        prev = np.asarray(self.model.alphas_cumprod_prev.cpu(), dtype=np.float64)
        sigmas = self._eta * np.sqrt((1 - prev) / (1 - alphas) * (1 - alphas / prev))  # eq. 16
        return Steps(np.arange(len(alphas)), alphas, prev, sigmas, _direction(prev, sigmas))
