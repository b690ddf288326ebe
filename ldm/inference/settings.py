"""What a sampling script is asked for, checked against the model's YAML before anything heavy is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.config.model_info import (
    SAFETY_MODES,
    ModelInfo,
    model_info,
    read_config,
    require_text_model,
    script_for,
    takes_text,
    value_at,
)
from ldm.models.diffusion.samplers.registry import SAMPLERS

# What is asked of a model and what is known of it come from one place for scripts.
__all__ = [
    "MAX_SEED",
    "PRECISIONS",
    "SAFETY_MODES",
    "SEED_MODES",
    "TILE",
    "ModelInfo",
    "SamplerSettings",
    "TextToImageRequest",
    "batches_of",
    "check_eta",
    "check_scale",
    "check_seed",
    "check_seed_mode",
    "check_size",
    "check_spacing",
    "check_steps",
    "check_tiled",
    "model_info",
    "read_config",
    "read_prompts",
    "require_text_model",
    "round_to_multiple",
    "sampler_eta",
    "script_for",
    "takes_text",
    "value_at",
]

PRECISIONS = ("auto", "full", "autocast", "bf16", "fp16")
MAX_SEED = 2**32 - 1
SEED_MODES = ("batch", "image")
TILE = 512  # usual side of a tile, in pixels
READS_TOKENS = ("FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder", "CaptionEmbedder")  # encoders over CLIP's tokens
READS_OTHERS = ("BERTEmbedder",)


@dataclass(frozen=True)
class SamplerSettings:
    """Which sampler walks, and what it is asked beside the number of its steps."""

    sampler: str = "ddim"
    spacing: str = "uniform"  # how the steps are spread over the schedule
    guidance_rescale: float = 0.0  # 0 off; 0.7 usual (arXiv 2305.08891, section 3.4)
    dynamic_threshold: float | None = None  # a share, 0.995 usual (Imagen, arXiv 2205.11487, section 2.3); None off

    @property
    def sampler_options(self) -> dict[str, Any]:
        """What a sampler's `sample` is given of it."""
        return {"ddim_discretize": self.spacing, **self.prediction_options}

    @property
    def prediction_options(self) -> dict[str, Any]:
        """What a sampler's `decode` is given of it, its schedule being made."""
        return {"guidance_rescale": self.guidance_rescale, "dynamic_threshold": self.dynamic_threshold}

    def check_sampler(self, info: ModelInfo, scale: float) -> None:
        """ValueError for a sampler that there is not, and for what it or the model cannot honour."""
        check_spacing(self.sampler, self.spacing, info)
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise ValueError(f"--guidance_rescale {self.guidance_rescale}: choose 0 (off) to 1; 0.7 is usual")
        if self.guidance_rescale and scale == 1.0:
            raise ValueError(
                f"--guidance_rescale {self.guidance_rescale:g} with --scale 1: there is no guidance at 1; leave one out"
            )
        if self.dynamic_threshold is not None and not 0.0 < self.dynamic_threshold <= 1.0:
            raise ValueError(
                f"--dynamic_threshold {self.dynamic_threshold}: choose a share above 0 and up to 1; 0.995 is usual"
            )


@dataclass(frozen=True)
class TextToImageRequest(SamplerSettings):
    """How pictures are drawn; the defaults are the published txt2img's. All of it goes into the pictures' metadata."""

    negative_prompt: str = ""  # what guidance leads away from; empty is the published "no text"
    steps: int = 50
    scale: float = 7.5  # guidance, eps = eps_uncond + scale * (eps_cond - eps_uncond)
    eta: float | None = None  # noise of the steps: 0 deterministic, 1 that of DDPM; None: the sampler's own, 0 for DDIM
    height: int = 512  # in pixels
    width: int = 512
    channels: int | None = None  # of the latent; None: the model's
    factor: int | None = None  # pixels per latent cell; None: the model's
    seed: int = 42
    n_samples: int = 3  # pictures drawn at once
    n_iter: int = 2  # how often all prompts are drawn
    fixed_code: bool = False  # every batch starts from the same noise
    seed_mode: str = "batch"  # one stream of noise for all, as published; "image": picture k has that of seed + k, whatever the batches
    tiled: int = 0  # side in pixels of the overlapping tiles that the first stage works in; 0: in one piece
    emphasis: bool = False  # prompts may weigh words, (word:1.3)
    long_prompts: bool = False  # prompts of more tokens than the encoder takes at once are encoded in chunks
    chunks: int | None = None  # how many; None: as many as the longest of all prompts needs

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent, once `checked`."""
        return self.channels, self.height // self.factor, self.width // self.factor

    def checked(self, info: ModelInfo) -> TextToImageRequest:
        """The same settings with the model's own values filled in; ValueError names a flag, its value and the choices."""
        for flag, value in (
            ("--n_samples", self.n_samples),
            ("--n_iter", self.n_iter),
            ("--f", self.factor),
            ("--C", self.channels),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{flag} {value}: choose 1 or more")
        check_steps("--ddim_steps", self.steps, info)
        eta = sampler_eta(self.sampler, self.eta)
        check_scale(self.scale)
        self.check_sampler(info, self.scale)
        if self.negative_prompt and self.scale == 1.0:
            raise ValueError(
                "--negative_prompt with --scale 1: there is no guidance at 1; choose another scale, 7.5 is usual"
            )
        check_seed(self.seed)
        check_seed_mode(self.seed_mode)
        if self.fixed_code and self.seed_mode == "image":
            raise ValueError(
                "--fixed_code with --seed_mode image: there every picture has a noise of its own; leave one of them out"
            )
        if self.channels not in (None, info.channels):
            raise ValueError(f"--C {self.channels}: this model's latents have {info.channels} channels; leave --C out")
        factor = self.factor or info.factor
        if factor is None:
            raise ValueError(
                "--f: the config does not tell how much the first stage shrinks a picture; give it, e.g. --f 8"
            )
        check_size(self.height, self.width, factor * info.latent_multiple)
        check_tiled(self.tiled, info.factor or factor)
        self._check_prompt_tools(info)
        return replace(self, channels=info.channels, factor=factor, eta=eta)

    def _check_prompt_tools(self, info: ModelInfo) -> None:
        if self.chunks is not None and (self.chunks < 1 or not self.long_prompts):
            raise ValueError(f"chunks {self.chunks}: choose 1 or more, with long_prompts")
        for flag, asked in (("--emphasis", self.emphasis), ("--long_prompts", self.long_prompts)):
            if asked and info.condition_name in READS_OTHERS:
                raise ValueError(
                    f"{flag}: works with {', '.join(READS_TOKENS)}; this model reads prompts with {info.condition_name}"
                )
        if self.emphasis:
            from ldm.inference.prompt_weights import check_emphasis

            check_emphasis(self.negative_prompt)


def check_steps(flag: str, steps: int, info: ModelInfo) -> None:
    if not 1 <= steps <= info.timesteps:
        raise ValueError(f"{flag} {steps}: choose 1 to {info.timesteps}, the length of this model's noise schedule")


def check_eta(flag: str, eta: float) -> None:
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"{flag} {eta}: choose 0 (deterministic) to 1 (as noisy as DDPM)")


def sampler_eta(sampler: str, eta: float | None, flag: str = "--ddim_eta") -> float:
    """The eta that a sampler walks with; ValueError for an unknown sampler and for an eta that it cannot have."""
    if sampler not in SAMPLERS:
        raise ValueError(f"--sampler {sampler}: choose one of {', '.join(SAMPLERS)}")
    entry = SAMPLERS[sampler]
    if eta is None:
        return entry.default_eta
    check_eta(flag, eta)
    if eta != entry.default_eta and not entry.takes_eta:
        nature = (
            "is deterministic, so that eta must be 0" if entry.default_eta == 0 else "has a noise of its own, eta 1"
        )
        takers = ", ".join(name for name, other in SAMPLERS.items() if other.takes_eta)
        raise ValueError(
            f"{flag} {eta:g}: {sampler} {nature}; leave it out, or choose a sampler that takes any: {takers}"
        )
    return eta


def check_spacing(sampler: str, spacing: str, info: ModelInfo) -> None:
    """ValueError unless the sampler can spread its steps so over this model's schedule."""
    if sampler not in SAMPLERS:
        raise ValueError(f"--sampler {sampler}: choose one of {', '.join(SAMPLERS)}")
    entry = SAMPLERS[sampler]
    if spacing not in entry.spacings:
        raise ValueError(f"--spacing {spacing}: {sampler} takes {', '.join(entry.spacings)}")
    if info.zero_terminal_snr and entry.continuous_time and spacing != "trailing":
        raise ValueError(
            f"--spacing {spacing}: {sampler} cannot start where no signal is left, as in this schedule; choose trailing"
        )


def check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"--scale {scale}: choose a finite number; 1 is no guidance, 7.5 is usual")


def check_seed(seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"--seed {seed}: choose 0 to {MAX_SEED}")


def check_seed_mode(mode: str) -> None:
    if mode not in SEED_MODES:
        raise ValueError(f"--seed_mode {mode}: choose one of {', '.join(SEED_MODES)}")


def check_size(height: int, width: int, multiple: int) -> None:
    """ValueError that names the nearest sizes unless both sides are positive multiples of `multiple` pixels."""
    if height > 0 and width > 0 and not height % multiple and not width % multiple:
        return
    near = {"--H": height, "--W": width}
    near = {flag: round_to_multiple(side, multiple) for flag, side in near.items()}
    raise ValueError(
        f"--H {height} --W {width}: this model needs multiples of {multiple} pixels; nearest are --H {near['--H']} --W {near['--W']}"
    )


def check_tiled(side: int, factor: int) -> None:
    """ValueError unless tiles of `side` pixels are at least four whole latent cells, or 0 for none."""
    if side and (side < 4 * factor or side % factor):
        raise ValueError(f"--tiled {side}: choose a multiple of {factor} pixels from {4 * factor} on; {TILE} is usual")


def round_to_multiple(side: int, multiple: int) -> int:
    """The multiple that is nearest to a side in pixels, at least one."""
    return max(multiple, round(side / multiple) * multiple)


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file, one prompt each, empty ones included; ValueError where there are none or it is no UTF-8 text."""
    try:
        prompts = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--from-file {path}: no UTF-8 text (byte {error.start}); save it as UTF-8, one prompt a line"
        ) from error
    except OSError as error:
        raise ValueError(
            f"--from-file {path}: {error.strerror or error}; give a text file with one prompt a line"
        ) from error
    if not prompts:
        raise ValueError(f"--from-file {path}: the file is empty; write one prompt a line")
    return prompts


def batches_of(prompts: str | Sequence[str], n_samples: int) -> list[list[str]]:
    """What is drawn at once: `n_samples` times the one prompt, or the next `n_samples` of a list; its last batch may have fewer."""
    if isinstance(prompts, str):
        return [[prompts] * n_samples]
    return [list(prompts[start : start + n_samples]) for start in range(0, len(prompts), n_samples)]
