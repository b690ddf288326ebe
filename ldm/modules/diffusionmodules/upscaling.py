"""Noise augmentation of an upscaler's low-resolution image (Ho et al. 2021, arXiv 2106.15282)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.config.types import PositiveInt
from ldm.modules.diffusionmodules.schedule import Schedule, extract_into_tensor, make_beta_schedule
from ldm.modules.dtype import Float32Tables
from ldm.rng import Purpose, integers, normal_like

OPTIONS = ("beta_schedule", "timesteps", "linear_start", "linear_end", "cosine_s")


class ImageConcatWithNoiseAugmentation(Float32Tables):
    """Adds noise to low-resolution images: q(x_s | x_0) at a level s of its own noise schedule.

    noise_schedule_config: any of OPTIONS, as for a model, by default 1000 levels. max_noise_level: upper limit of the
    random levels in training. `to_cuda` is part of the published signature and unused.
    """

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor

    def __init__(
        self,
        noise_schedule_config: Mapping[str, Any] | None = None,
        max_noise_level: PositiveInt = 1000,
        to_cuda: bool = False,
    ) -> None:
        super().__init__()
        options = {"beta_schedule": "linear", "timesteps": 1000, **(noise_schedule_config or {})}
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ValueError(f"noise_schedule_config: unknown {', '.join(unknown)}; choose from {', '.join(OPTIONS)}")
        betas = make_beta_schedule(options.pop("beta_schedule"), options.pop("timesteps"), **options)
        self.num_timesteps = len(betas)
        if not 1 <= max_noise_level <= self.num_timesteps:
            raise ValueError(f"max_noise_level {max_noise_level}: choose 1 to {self.num_timesteps} (its timesteps)")
        self.max_noise_level = max_noise_level
        for name, table in Schedule.from_betas(betas).tables().items():
            if not name.startswith("posterior"):  # published checkpoints hold the other tables
                self.register_buffer(name, torch.from_numpy(table).float())

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, C, h, w), noise_level: (B,) int64 in [0, num_timesteps), random if None -> (noised x, noise_level)."""
        if noise_level is None:
            noise_level = integers(self.max_noise_level, x.shape[0], Purpose.LOW_SCALE_LEVEL, x.device)
        alpha = extract_into_tensor(self.sqrt_alphas_cumprod, noise_level, x.shape)
        sigma = extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, noise_level, x.shape)
        # Contiguous, so that the noise does not depend on the memory layout of x.
        noise = normal_like(x.contiguous(), Purpose.LOW_SCALE_NOISE)
        return alpha * x + sigma * noise, noise_level

    def decode(self, x: Tensor) -> Tensor:
        """Return x, for image logs: low-resolution images are not encoded."""
        return x
