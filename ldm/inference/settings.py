"""Base of all requests: the sampler's settings and the checks that every task shares. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

from ldm.config.model_info import ModelInfo
from ldm.models.diffusion.samplers.registry import SAMPLERS

PRECISIONS = ("auto", "full", "autocast", "bf16", "fp16")
MAX_SEED = 2**32 - 1
SEED_MODES = ("batch", "image")
TILE = 512  # usual side of a tile, in pixels


@dataclass(frozen=True)
class Request:
    """What a task is asked for. `checked` resolves every None once; nothing downstream checks again."""

    task: ClassVar[str]  # in the metadata
    steps_flag: ClassVar[str] = "--steps"
    eta_flag: ClassVar[str] = "--ddim_eta"
    usual_scale: ClassVar[float] = 7.5
    unrecorded: ClassVar[tuple[str, ...]] = ()  # fields that are not part of the metadata
    checked_for: ClassVar[ModelInfo | None] = None  # set on the instance that `checked` returns

    sampler: str = "ddim"
    steps: int | None = 50
    eta: float | None = None  # noise per step: 0 deterministic, 1 that of DDPM; None: the sampler's default, 0 for DDIM
    scale: float | None = None  # guidance, eps = eps_uncond + scale * (eps_cond - eps_uncond); 1 disables it
    negative_prompt: str = ""  # conditioning of eps_uncond; empty as published
    seed: int = 42
    spacing: str = "uniform"  # timestep spacing
    guidance_rescale: float = 0.0  # 0 off, 0.7 usual (arXiv 2305.08891, section 3.4)
    dynamic_threshold: float | None = None  # a quantile, 0.995 usual (Imagen, arXiv 2205.11487, section 2.3); None off

    def checked(self, info: ModelInfo) -> Self:
        """Return the request with every default resolved for a model.

        Raises ValueError with the flag, its value and the choices. A checked request is returned as it is.
        """
        if self.checked_for == info:
            return self
        request = self._resolved(info)
        object.__setattr__(request, "checked_for", info)
        return request

    def record(self) -> dict[str, Any]:
        """The request as metadata of an image."""
        return {"task": self.task, **{name: x for name, x in asdict(self).items() if name not in self.unrecorded}}

    @property
    def prediction_options(self) -> dict[str, Any]:
        """Keyword arguments for `Sampler.decode`."""
        return {"guidance_rescale": self.guidance_rescale, "dynamic_threshold": self.dynamic_threshold}

    def _resolved(self, info: ModelInfo) -> Self:
        """Check what all requests have in common; subclasses fill in their own defaults first."""
        check_steps(self.steps_flag, self.steps, info)
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"--seed {self.seed}: choose 0 to {MAX_SEED}")
        eta = self._resolved_eta()
        self._check_spacing(info)
        self._check_guidance()
        return replace(self, eta=eta)

    def _resolved_eta(self) -> float:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"--sampler {self.sampler}: choose one of {', '.join(SAMPLERS)}")
        entry = SAMPLERS[self.sampler]
        if self.eta is None:
            return entry.default_eta
        if not (math.isfinite(self.eta) and self.eta >= 0):
            raise ValueError(f"{self.eta_flag} {self.eta}: choose 0 (deterministic) to 1 (the noise of DDPM)")
        if self.eta != entry.default_eta and not entry.takes_eta:
            fixed = "is deterministic (eta 0)" if entry.default_eta == 0 else "has a fixed eta of 1"
            others = ", ".join(name for name, other in SAMPLERS.items() if other.takes_eta)
            raise ValueError(
                f"{self.eta_flag} {self.eta:g}: {self.sampler} {fixed}; "
                f"remove the flag, or choose a sampler with an adjustable eta: {others}"
            )
        return self.eta

    def _check_spacing(self, info: ModelInfo) -> None:
        entry = SAMPLERS[self.sampler]
        if self.spacing not in entry.spacings:
            raise ValueError(f"--spacing {self.spacing}: {self.sampler} supports {', '.join(entry.spacings)}")
        if info.zero_terminal_snr and entry.continuous_time and self.spacing != "trailing":
            raise ValueError(
                f"--spacing {self.spacing}: {self.sampler} cannot start at zero terminal SNR, which this model's "
                "schedule has; choose trailing"
            )

    def _check_guidance(self) -> None:
        if self.scale is None or not math.isfinite(self.scale):
            raise ValueError(f"--scale {self.scale}: choose a finite number; 1 disables guidance")
        if self.negative_prompt and self.scale == 1.0:
            raise ValueError(
                "--negative_prompt with --scale 1: scale 1 disables guidance; "
                f"choose another scale, {self.usual_scale:g} is usual"
            )
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise ValueError(f"--guidance_rescale {self.guidance_rescale}: choose 0 (off) to 1; 0.7 is usual")
        if self.guidance_rescale and self.scale == 1.0:
            raise ValueError(
                f"--guidance_rescale {self.guidance_rescale:g} with --scale 1: scale 1 disables guidance; "
                "remove one of them"
            )
        if self.dynamic_threshold is not None and not 0.0 < self.dynamic_threshold <= 1.0:
            raise ValueError(
                f"--dynamic_threshold {self.dynamic_threshold}: choose a quantile above 0 and up to 1; 0.995 is usual"
            )


def check_steps(flag: str, steps: int | None, info: ModelInfo) -> None:
    if steps is None or not 1 <= steps <= info.timesteps:
        raise ValueError(f"{flag} {steps}: choose 1 to {info.timesteps}, the length of this model's noise schedule")


def check_positive(values: Mapping[str, int | None]) -> None:
    """Raise ValueError for the first flag whose value is below 1; None is not checked."""
    for flag, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value}: choose 1 or more")


def check_seed_mode(mode: str) -> None:
    if mode not in SEED_MODES:
        raise ValueError(f"--seed_mode {mode}: choose one of {', '.join(SEED_MODES)}")


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise ValueError, with the nearest valid size, unless both sides are positive multiples of `multiple` pixels."""
    if min(height, width) <= 0 or height % multiple or width % multiple:
        near_height, near_width = (round_to_multiple(side, multiple) for side in (height, width))
        raise ValueError(
            f"--H {height} --W {width}: this model needs multiples of {multiple} pixels; "
            f"nearest are --H {near_height} --W {near_width}"
        )


def round_to_multiple(side: int, multiple: int) -> int:
    """The nearest multiple, at least one."""
    return max(multiple, round(side / multiple) * multiple)
