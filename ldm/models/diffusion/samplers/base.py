"""The sampling loop that all samplers share; a subclass has its `make_steps` and `step`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.config.suggest import log_unused
from ldm.models.diffusion.conditioning import Conditioning, condition_batch_size
from ldm.models.diffusion.samplers.denoiser import DiffusionModel, SamplingOptions, SamplingRun, ScoreCorrector, Steps
from ldm.models.diffusion.samplers.published import PublishedSampler, sampling_options
from ldm.modules.diffusionmodules.schedule import check_steps


class Samples(NamedTuple):
    """Final latent (B, C, H, W) and {"x_inter": [...], "pred_x0": [...]}: the start and every `log_every_t`-th step."""

    samples: Tensor
    intermediates: dict[str, list[Tensor]]


class Sampler(PublishedSampler, ABC):
    """Base of all samplers. It stores the model and its schedule's steps; a run's values live in its `SamplingRun`.

    The class attributes are literals, since the registry reads them from the source.
    """

    spacings: ClassVar[tuple[str, ...]] = ("uniform", "quad", "trailing")  # supported values of `ddim_discretize`
    default_eta: ClassVar[float] = 0.0
    takes_eta: ClassVar[bool] = False  # eta may differ from the default
    adds_noise: ClassVar[bool] = False  # steps add noise that temperature and noise_dropout act on
    continuous_time: ClassVar[bool] = False  # steps may lie between timesteps
    # A mask keeps x0 in the latent `before` or `after` a step, with new noise each time, as published for DDIM, PLMS
    # and DDPM. Other samplers extrapolate predictions and need them smooth: there x0 replaces the `prediction`.
    mask_blend: ClassVar[str] = "prediction"
    published_loop: ClassVar[str] = ""  # the published name of `sampling_loop`, which research code overrides
    _scheduled: Steps | None = None
    _eta: float = 0.0

    def __init__(
        self,
        model: DiffusionModel,
        schedule: str = "linear",
        device: torch.device | str | None = None,
        **unused: Any,
    ) -> None:
        """`device` and other keywords of published samplers are accepted: the latents are on the model's device."""
        if schedule != "linear":
            raise ValueError(f"schedule {schedule!r}: only 'linear' is supported; the betas are the model's")
        if device is not None and torch.device(device).type != torch.device(model.device).type:
            unused |= {f"device={device} of a model on {model.device}": device}
        log_unused(type(self).__name__, unused)
        self.model = model

    @abstractmethod
    def make_steps(self, S: int, eta: float, spacing: str) -> Steps:
        """The S steps of a run; the arguments are already checked."""

    @abstractmethod
    def step(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        """One step from k to k-1 -> (x_prev, predicted x_0), both (B, C, H, W)."""

    def checked_steps(self, S: int, eta: float | None = None, spacing: str = "uniform") -> Steps:
        """The S steps of a run; ValueError if the sampler or its model does not support S, eta or the spacing."""
        name = type(self).__name__
        check_steps(S, self.model.num_timesteps)
        if spacing not in self.spacings:
            choices = ", ".join(self.spacings)
            raise ValueError(f"ddim_discretize {spacing!r} is not supported by {name}: choose one of {choices}")
        eta = self.default_eta if eta is None else eta
        if not self.takes_eta and eta != self.default_eta:
            raise ValueError(f"eta {eta:g}: {name} supports only {self.default_eta:g}; DDIM supports any eta")
        if not (math.isfinite(eta) and eta >= 0):
            raise ValueError(f"eta {eta}: choose 0 (deterministic) to 1 (as noisy as DDPM)")
        steps = self.make_steps(S, eta, spacing)
        if steps.alphas[-1] == 0.0 and self.model.parameterization == "eps":
            raise ValueError("a zero-terminal-SNR schedule starts from pure noise, where eps gives no x_0; use v or x0")
        return steps

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Conditioning = None,
        callback: Callable[[int], None] | None = None,
        normals_sequence: None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        quantize_x0: bool = False,
        eta: float | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        ddim_discretize: str = "uniform",
        **options: Any,
    ) -> Samples:
        """Sample `batch_size` latents of `shape` (C, H, W) in S steps.

        `x_T` (B, C, H, W) replaces the initial noise. Where `mask` (B, 1, H, W) is 1 the result keeps `x0`.
        `callback(i)` and `img_callback(pred_x0, i)` run after step i. `verbose` shows a progress bar. `eta` None is the
        sampler's default, `ddim_discretize` its timestep spacing; `options` are the other fields of `SamplingOptions`;
        unknown ones are logged once as unused, since research code passes more.
        ValueError for an S, eta, shape, condition or option that is not supported.
        """
        if normals_sequence is not None:
            raise ValueError("normals_sequence is not supported; pass the initial noise as x_T")
        if len(shape) != 3:
            raise ValueError(f"shape {tuple(shape)}: expected (channels, height, width) of one latent")
        steps = self.checked_steps(S, eta, ddim_discretize)
        asked = sampling_options(
            type(self).__name__,
            temperature=temperature,
            noise_dropout=noise_dropout,
            quantize_x0=quantize_x0,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            **options,
        )
        expected = (batch_size, *shape)
        if x_T is not None and tuple(x_T.shape) != expected:
            raise ValueError(f"x_T has shape {tuple(x_T.shape)}, expected {expected}")
        self._scheduled = steps  # published: callbacks read the ddim_* tables
        self._eta = self.default_eta if eta is None else eta
        if self.published_loop and self.overrides(self.published_loop, PublishedSampler.sampling_loop):
            return Samples(
                *getattr(self, self.published_loop)(
                    conditioning,
                    expected,
                    x_T=x_T,
                    callback=callback,
                    quantize_denoised=quantize_x0,
                    mask=mask,
                    x0=x0,
                    img_callback=img_callback,
                    log_every_t=log_every_t,
                    temperature=temperature,
                    noise_dropout=noise_dropout,
                    score_corrector=score_corrector,
                    corrector_kwargs=corrector_kwargs,
                    unconditional_guidance_scale=unconditional_guidance_scale,
                    unconditional_conditioning=unconditional_conditioning,
                    **options,
                )
            )
        x = asked.noise_source.normal(expected, self.model.device) if x_T is None else x_T
        run = self._start(steps, x, conditioning, unconditional_guidance_scale, unconditional_conditioning, asked)
        return self.loop(x, run, S, mask, x0, callback, img_callback, log_every_t, verbose)

    def loop(
        self,
        x: Tensor,
        run: SamplingRun,
        start: int,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        log_every_t: int = 100,
        verbose: bool = True,
    ) -> Samples:
        """Take the last `start` steps of the run, from x down to the clean latent."""
        known = None
        if mask is not None:
            if x0 is None:
                raise ValueError("mask needs x0, the latent that is kept where the mask is 1")
            if mask.shape[-2:] != x0.shape[-2:]:
                raise ValueError(f"mask {tuple(mask.shape)} and x0 {tuple(x0.shape)} differ in height or width")
            known = mask, x0
        run.known = known if self.mask_blend == "prediction" else None
        intermediates = {"x_inter": [x], "pred_x0": [x]}
        for i in tqdm(range(start), desc=type(self).__name__, disable=not verbose, leave=False):
            k = start - 1 - i
            if known is not None and self.mask_blend == "before":
                x = run.blend(x, *known, k)
            x, pred_x0 = self.step(x, k, run)
            if known is not None and self.mask_blend == "after":
                x = run.blend(x, *known, k)
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(pred_x0, i)
            if k % log_every_t == 0 or i == 0:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(pred_x0)
        return Samples(x, intermediates)

    # -------------------------------------------------------------------------------------------------- image to image

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float | None = None, verbose: bool = True
    ) -> None:
        """Set the steps that `stochastic_encode` and `decode` use, and the `ddim_*` tables."""
        self._eta = self.default_eta if ddim_eta is None else ddim_eta
        self._scheduled = self.checked_steps(ddim_num_steps, self._eta, ddim_discretize)

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor | Sequence[int], use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Noise x0 (B, C, H, W) to the level from which `decode` starts with t_start = t; t: (B,) in [0, S].

        At t = 0 this is x0 itself; at t = S, which strength 1 asks for, it is pure noise. A tensor is read.
        """
        alphas = self._encoding_alphas(self._steps_of(use_original_steps))
        levels = t.tolist() if torch.is_tensor(t) else list(t)
        if min(levels) < 0 or max(levels) >= len(alphas):
            raise ValueError(f"encoding step {levels}: choose 0 to {len(alphas) - 1}")
        alpha = torch.as_tensor(alphas[levels], dtype=torch.float32, device=x0.device)[:, None, None, None]
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
        img_callback: Callable[[Tensor, int], None] | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Denoise a latent (B, C, H, W) over the last `t_start` steps of the schedule.

        `mask` and `x0` as in `sample`; `options` are fields of `SamplingOptions`, e.g. guidance_rescale=0.7.
        """
        steps = self._steps_of(use_original_steps)
        if not 0 <= t_start <= len(steps.t):
            raise ValueError(f"t_start {t_start}: choose 0 to {len(steps.t)}")
        asked = sampling_options(type(self).__name__, **options)
        run = self._start(steps, x_latent, cond, unconditional_guidance_scale, unconditional_conditioning, asked)
        return self.loop(x_latent, run, t_start, mask, x0, callback, img_callback, verbose=verbose).samples

    def _encoding_alphas(self, steps: Steps) -> np.ndarray:
        """Products of (1 - beta) from which the last 0 to S steps start, (S + 1,)."""
        return np.concatenate([[1.0], steps.alphas[:-1], [0.0]])

    def _steps_of(self, use_original_steps: bool = False) -> Steps:
        if use_original_steps:
            raise ValueError(f"use_original_steps: not supported by {type(self).__name__}; use DDIM")
        if self._scheduled is None:
            raise ValueError("call make_schedule(ddim_num_steps=...) first")
        return self._scheduled

    def _start(
        self, steps: Steps, x: Tensor, cond: Conditioning, scale: float, uncond: Conditioning, options: SamplingOptions
    ) -> SamplingRun:
        for name, condition in (("conditioning", cond), ("unconditional_conditioning", uncond)):
            size = condition_batch_size(condition)
            if size is not None and size != len(x):
                raise ValueError(f"{name} is for {size} samples, batch_size is {len(x)}")
        scales = {"unconditional_guidance_scale": scale, "image_guidance_scale": options.image_guidance_scale}
        for name, value in scales.items():
            if value != 1.0 and uncond is None:
                raise ValueError(f"{name} {value:g} needs unconditional_conditioning; 1 does not")
        changes_noise = options.temperature != 1.0 or options.noise_dropout > 0.0 or options.repeat_noise
        if changes_noise and not self.adds_noise:
            name = type(self).__name__
            raise ValueError(f"{name} adds no noise: temperature, noise_dropout and repeat_noise have no effect")
        return SamplingRun(self.model, steps, x, cond, uncond, scale, options)


class ContinuousTimeSampler(Sampler):
    """Base of the samplers whose steps may lie between timesteps."""

    spacings = ("uniform", "logsnr", "karras", "trailing")
    continuous_time = True
