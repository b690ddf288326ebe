"""Samples from fixed conditions and fixed noise: images of several validations differ by the training alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.config.types import NonNegativeFloat, NonNegativeInt, PathText, PositiveFloat, PositiveInt
from ldm.models.diffusion.condition_stage import ConditionStage
from ldm.models.diffusion.conditioning import main_part
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.models.diffusion.image_log import GUIDANCE_SCALE
from ldm.models.diffusion.samplers.registry import SAMPLERS, make_sampler
from ldm.modules.encoders.base import AbstractEncoder
from ldm.modules.encoders.modules import ClassEmbedder
from ldm.paths import expand_user, lines_of


@dataclass(frozen=True)
class FixedSamples:
    """The section `fixed_samples` of the image log.

    prompts: texts, class numbers, or a text file with one on each line; None for an unconditional model, of which
        `count` images are sampled.
    seed: of the first image's initial noise; the next images have the next seeds.
    scale: guidance scale; None is 3 for a model that is trained with cond_dropout, else 1.
    sampler, steps, eta: as in scripts/txt2img.py; eta None is the sampler's default. batch_size: of the sampling.
    """

    prompts: Sequence[str | int] | PathText | None = None
    count: PositiveInt = 4
    seed: NonNegativeInt = 0
    scale: PositiveFloat | None = None
    sampler: str = "ddim"
    steps: PositiveInt = 50
    eta: NonNegativeFloat | None = None
    batch_size: PositiveInt = 8

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r}: choose one of {', '.join(SAMPLERS)}")
        if self.eta is not None and not SAMPLERS[self.sampler].takes_eta:
            takers = ", ".join(name for name, sampler in SAMPLERS.items() if sampler.takes_eta)
            raise ValueError(f"eta {self.eta:g}: {self.sampler} has none; remove it, or choose one of {takers}")
        if isinstance(self.prompts, str) and not expand_user(self.prompts).is_file():
            raise ValueError(f"prompts {self.prompts}: no such file; set it to a list, or a file with one on each line")
        if self.prompts is not None and not self.conditions():
            raise ValueError("prompts: none; set at least one")

    def conditions(self) -> list[str | int]:
        """Return the prompts or class numbers; empty without any."""
        if isinstance(self.prompts, str):
            lines = lines_of(expand_user(self.prompts).read_text(encoding="utf-8-sig"))
            return [line.strip() for line in lines if line.strip()]
        return list(self.prompts or ())

    def check(self, model: DDPM) -> None:
        """Raise ValueError unless these prompts are all that the model needs."""
        if not isinstance(model, LatentDiffusion) or model.cond_stage_model is None:
            if self.prompts is not None:
                raise ValueError("prompts: this model is unconditional; remove them")
            return
        if self.prompts is None:
            raise ValueError("prompts: missing; this model is conditional")
        further = type(model).further_parts is not ConditionStage.further_parts or model.concat_keys or model.adm_key
        if further or main_part(model.model.conditioning_key) == "c_concat":
            raise ValueError("prompts: this model needs more than prompts; log its samples of a batch instead")
        if isinstance(stage := model.cond_stage_model, ClassEmbedder):
            last = stage.n_classes - 1
            for each in self.conditions():
                if not str(each).isdecimal() or int(each) > last:
                    raise ValueError(f"prompts: {each!r} is not a class; expected numbers from 0 to {last}")

    @torch.no_grad()
    def sample(self, model: DDPM) -> tuple[Tensor, list[str]]:
        """Return images (B, C, H, W) in about [-1, 1], by the averaged weights if there are any, and captions."""
        given, shape = self.conditions(), model.latent_shape()
        seeds = [self.seed + k for k in range(len(given) or self.count)]
        sampler, images = make_sampler(self.sampler, model), []
        for first in range(0, len(seeds), self.batch_size):
            part = slice(first, first + self.batch_size)
            noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds[part]]
            with model.ema_scope("Plotting"):
                options = self._condition(model, given[part]) if isinstance(model, LatentDiffusion) and given else {}
                options |= {"x_T": torch.stack(noise).to(model.device), "eta": self.eta, "verbose": False}
                x = sampler.sample(min(self.steps, model.num_timesteps), len(noise), shape, **options).samples
            images.append(model.decode_first_stage(x) if isinstance(model, LatentDiffusion) else x)
        return torch.cat(images), [str(each) for each in given] or [f"seed {seed}" for seed in seeds]

    def _condition(self, model: LatentDiffusion, given: Sequence[str | int]) -> dict[str, Any]:
        """Return the sampler's arguments of condition and guidance."""
        stage, integers = model.cond_stage_model, all(isinstance(each, int) for each in given)
        numbers = isinstance(stage, ClassEmbedder) or (integers and not isinstance(stage, AbstractEncoder))
        values = torch.tensor([int(each) for each in given]) if numbers else [str(each) for each in given]
        raw = model.raw_condition({model.cond_stage_key: values}, model.cond_stage_key)
        cond = model.get_learned_conditioning(raw)
        scale = self.scale or (GUIDANCE_SCALE if model.cond_dropout > 0 else 1.0)
        if scale == 1.0:
            return {"conditioning": cond}
        uncond = model.unconditional_like(cond, raw, len(given))
        guidance = {"unconditional_guidance_scale": scale, "unconditional_conditioning": uncond}
        return {"conditioning": cond, **guidance}
