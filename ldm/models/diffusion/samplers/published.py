"""Members that research code takes from the published DDIM and PLMS samplers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.config.suggest import log_unused
from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.published import ImageCallback, StepCallback
from ldm.models.diffusion.samplers.denoiser import SamplingOptions, ScoreCorrector

if TYPE_CHECKING:  # the samplers are built on this module
    from ldm.models.diffusion.samplers.base import Samples


class PublishedSampler:
    """Attributes and methods that research code takes from the published DDIM and PLMS samplers.

    The tables are attributes that a subclass may replace, as the published `make_schedule` sets them. Those of the
    schedule need `make_schedule` or `sample` first.
    """

    _steps_of: Callable[..., Any]
    _start: Callable[..., Any]
    loop: Callable[..., Any]
    model: Any

    def __getattr__(self, name: str) -> Any:
        if name not in _SAMPLER_TABLES:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return _SAMPLER_TABLES[name](self)

    def register_buffer(self, name: str, attr: Any) -> None:
        """Set an attribute, a tensor on the model's device."""
        setattr(self, name, attr.to(self.model.device) if torch.is_tensor(attr) else attr)

    @torch.no_grad()
    def sampling_loop(
        self,
        cond: Conditioning,
        shape: Sequence[int],
        x_T: Tensor | None = None,
        ddim_use_original_steps: bool = False,
        callback: StepCallback = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: ImageCallback = None,
        log_every_t: int = 100,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: ScoreCorrector | None = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        **options: Any,
    ) -> Samples:
        """Published `ddim_sampling` and `plms_sampling`: sample `shape` (B, C, H, W) over the schedule.

        `timesteps` takes the last of its steps only: one fewer than given, as published, but all original ones.
        """
        asked = sampling_options(
            type(self).__name__,
            quantize_x0=quantize_denoised,
            temperature=temperature,
            noise_dropout=noise_dropout,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            **options,
        )
        steps = self._steps_of(ddim_use_original_steps)
        start = len(steps.t)
        if timesteps is not None:
            start = min(timesteps, start) - (0 if ddim_use_original_steps else 1)
        x = asked.noise_source.normal(shape, self.model.device) if x_T is None else x_T
        run = self._start(steps, x, cond, unconditional_guidance_scale, unconditional_conditioning, asked)
        return self.loop(x, run, start, mask, x0, callback, img_callback, log_every_t, verbose=False)

    def overrides(self, name: str, own: Callable[..., Any]) -> bool:
        """Return whether a subclass or the object itself replaces the published method `name`, which here is `own`."""
        return getattr(getattr(self, name), "__func__", None) is not own


def sampling_options(caller: str, **options: Any) -> SamplingOptions:
    """Return the options of a run; unknown ones, which research code passes on, are logged once."""
    known = {field.name for field in fields(SamplingOptions)}
    log_unused(caller, set(options) - known, known)
    return SamplingOptions(**{name: value for name, value in options.items() if name in known})


def _on_device(sampler: PublishedSampler, table: Any) -> Tensor:
    return torch.as_tensor(table, dtype=torch.float32, device=sampler.model.device)


_MODEL_TABLES = """betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
    log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod"""
_SAMPLER_TABLES: dict[str, Callable[[Any], Any]] = {
    "schedule": lambda sampler: "linear",
    "device": lambda sampler: sampler.model.device,
    "ddpm_num_timesteps": lambda sampler: sampler.model.num_timesteps,
    "ddim_timesteps": lambda sampler: sampler._steps_of().t,  # (S,), increasing
    "ddim_alphas": lambda sampler: _on_device(sampler, sampler._steps_of().alphas),  # products of (1 - beta), (S,)
    "ddim_alphas_prev": lambda sampler: sampler._steps_of().alphas_prev,  # those at the end of each step, (S,)
    "ddim_sigmas": lambda sampler: _on_device(sampler, sampler._steps_of().sigmas),  # noise scale of each step, (S,)
    "ddim_sqrt_one_minus_alphas": lambda sampler: (1.0 - sampler.ddim_alphas).sqrt(),
    "ddim_sigmas_for_original_num_steps": lambda sampler: _on_device(sampler, sampler._steps_of(True).sigmas),
    **{name: attrgetter(f"model.{name}") for name in _MODEL_TABLES.split()},
}
