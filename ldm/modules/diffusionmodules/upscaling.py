"""What an upscaler does to the small picture before the network sees it: noise of a known level (Ho et al. 2021, arXiv 2106.15282)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.schedule import Schedule, extract_into_tensor, make_beta_schedule

OPTIONS = ("beta_schedule", "timesteps", "linear_start", "linear_end", "cosine_s")
TABLES = (  # of the schedule, which published files hold
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)


class ImageConcatWithNoiseAugmentation(nn.Module):
    """Adds noise to small pictures: q(x_s | x_0) at a level s of a schedule of its own, drawn below `max_noise_level` in training.

    noise_schedule_config: any of OPTIONS, as for a model; by default 1000 levels.
    """

    def __init__(
        self, noise_schedule_config: Mapping[str, Any] | None = None, max_noise_level: int = 1000, to_cuda: bool = False
    ) -> None:
        """to_cuda: part of the published signature; the module is moved with its model."""
        super().__init__()
        options = {"beta_schedule": "linear", "timesteps": 1000, **(noise_schedule_config or {})}
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ValueError(f"noise_schedule_config: unknown {', '.join(unknown)}; it takes {', '.join(OPTIONS)}")
        schedule = Schedule.from_betas(
            make_beta_schedule(options.pop("beta_schedule"), options.pop("timesteps"), **options)
        )
        self.num_timesteps = len(schedule)
        if not 1 <= max_noise_level <= self.num_timesteps:
            raise ValueError(
                f"max_noise_level {max_noise_level}: choose 1 to {self.num_timesteps}, the length of its noise schedule"
            )
        self.max_noise_level = max_noise_level
        tables = schedule.tables()
        for name in TABLES:
            self.register_buffer(name, torch.from_numpy(tables[name]).float())

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, C, h, w), noise_level: (B,) int64 in [0, num_timesteps), drawn where it is None -> (noised x, its levels)."""
        if noise_level is None:
            noise_level = torch.randint(0, self.max_noise_level, (x.shape[0],), device=x.device)
        alpha = extract_into_tensor(self.sqrt_alphas_cumprod, noise_level, x.shape)
        sigma = extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, noise_level, x.shape)
        noise = torch.randn_like(
            x, memory_format=torch.contiguous_format
        )  # else it would depend on how the pictures lie in memory
        return alpha * x + sigma * noise, noise_level

    def decode(self, x: Tensor) -> Tensor:
        """The picture that the network sees, for image logs: these pictures are not encoded."""
        return x
