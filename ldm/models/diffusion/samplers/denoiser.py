"""What one sampling run is made of: its grid of steps, its options, and the network's guided view of the signal at each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.samplers.guidance import guided_output
from ldm.models.diffusion.samplers.noise import PUBLISHED_NOISE, NoiseSource
from ldm.modules.diffusionmodules.parameterization import get_parameterization


class DiffusionModel(Protocol):
    """What samplers and pipelines use of a model; anything that has these can be sampled.

    `alphas_cumprod`, `alphas_cumprod_prev` and `betas` are (T,) tables, `parameterization` is `eps`, `x0` or `v`.
    """

    num_timesteps: int
    parameterization: str
    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor

    @property
    def device(self) -> torch.device:
        """Device of the latents."""

    def apply_model(self, x: Tensor, t: Tensor, cond: Conditioning, /) -> Tensor:
        """Return the network output (B, C, H, W) for noisy latents x (B, C, H, W) at timesteps t (B,)."""


class Grid(NamedTuple):
    """The steps of a sampler, from the smallest timestep up, float64.

    `alphas` and `alphas_prev` are products of (1 - beta) at each step and at the step that it leads to; `t` is what the
    network is given, whole numbers but for continuous-time solvers. `coefs` are tables of one sampler's own.
    """

    t: np.ndarray
    alphas: np.ndarray
    alphas_prev: np.ndarray
    sigmas: np.ndarray
    coefs: Mapping[str, np.ndarray] = MappingProxyType({})


@dataclass(frozen=True)
class Options:
    """What a caller may ask of a run beside its condition; ValueError for a value outside its range."""

    temperature: float = 1.0  # scales the noise of every step
    noise_dropout: float = 0.0  # share of that noise set to 0
    repeat_noise: bool = False  # one noise for the whole batch
    quantize_x0: bool = False  # predicted x_0 snaps to the first stage's codebook
    clip_denoised: bool = False  # predicted x_0 stays in [-1, 1]
    score_corrector: Any = (
        None  # its modify_score(model, eps, x, t, cond, **corrector_kwargs) returns the noise to use instead
    )
    corrector_kwargs: Mapping[str, Any] = field(default_factory=dict)
    guidance_rescale: float = 0.0  # phi of Lin et al. 2023, section 3.4: 0 off, 0.7 usual
    dynamic_threshold: float | None = None  # share of Imagen, section 2.3, e.g. 0.995; None off
    noise_source: NoiseSource = PUBLISHED_NOISE  # of every random number of the run

    def __post_init__(self) -> None:
        if not 0.0 <= self.noise_dropout < 1.0:
            raise ValueError(f"noise_dropout {self.noise_dropout}: choose a share in [0, 1)")
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise ValueError(f"guidance_rescale {self.guidance_rescale}: choose 0 (off) to 1, 0.7 is usual")
        if self.dynamic_threshold is not None and not 0.0 < self.dynamic_threshold <= 1.0:
            raise ValueError(
                f"dynamic_threshold {self.dynamic_threshold}: choose a share in (0, 1], 0.995 is usual, or None"
            )


class Run:
    """The values of one sampling run: tables on the latent's device, the condition, and the history of multistep solvers."""

    def __init__(
        self,
        model: Any,
        grid: Grid,
        x: Tensor,
        cond: Conditioning,
        uncond: Conditioning,
        scale: float,
        options: Options,
    ) -> None:
        self.model, self.cond, self.uncond, self.scale, self.options = model, cond, uncond, scale, options
        self.grid = grid
        self.parameterization = get_parameterization(model.parameterization)
        # Whole tables move once, so that no step waits for the device.
        whole = np.issubdtype(grid.t.dtype, np.integer)
        self.t = torch.as_tensor(grid.t, dtype=torch.int64 if whole else torch.float32, device=x.device)
        tables = {"alpha": grid.alphas, "alpha_prev": grid.alphas_prev, "sigma": grid.sigmas, **grid.coefs}
        self.coefs = {
            name: torch.as_tensor(table, dtype=torch.float32, device=x.device) for name, table in tables.items()
        }
        self.alpha, self.alpha_prev, self.sigma = self.coefs["alpha"], self.coefs["alpha_prev"], self.coefs["sigma"]
        self.history: list[Tensor] = []
        self.kept: tuple[Tensor, Tensor] | None = None  # mask and x_0: where the mask is 1 the prediction is x_0

    def predict(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The noise and the clean signal that the guided network sees in x at step k, each (B, C, H, W)."""
        alpha, sigma, t = self.alpha[k].sqrt(), (1 - self.alpha[k]).sqrt(), self.t[k].expand(x.shape[0])
        out = guided_output(self.model, x, t, self.cond, self.uncond, self.scale, self.options.guidance_rescale)
        eps, x0 = self.parameterization.to_eps(x, out, alpha, sigma), self.parameterization.to_x0(x, out, alpha, sigma)
        corrector = self.options.score_corrector
        if corrector is not None and not self.starts_from_noise(k):  # pure noise holds nothing that could be corrected
            eps = corrector.modify_score(self.model, eps, x, t, self.cond, **self.options.corrector_kwargs)
            x0 = (x - sigma * eps) / alpha
        x0 = self.refine(x0)
        if self.kept is not None:
            mask, known = self.kept
            x0 = known * mask + (1.0 - mask) * x0
        if self.options.dynamic_threshold is not None or self.kept is not None:
            eps = (x - alpha * x0) / sigma  # the noise is what such a prediction leaves of x
        return eps, x0

    def refine(self, x0: Tensor) -> Tensor:
        """Predicted x_0 after the thresholding, clipping and quantization that were asked for."""
        if self.options.dynamic_threshold is not None:
            x0 = dynamic_threshold(x0, self.options.dynamic_threshold)
        if self.options.clip_denoised:
            x0 = x0.clamp(-1.0, 1.0)
        if self.options.quantize_x0:
            x0 = self.model.first_stage_model.quantize(x0)[0]
        return x0

    def noise(self, x: Tensor) -> Tensor:
        """The step's noise, drawn even where its scale is 0 so that a seed gives the published image."""
        shape = (1, *x.shape[1:]) if self.options.repeat_noise else x.shape
        source = self.options.noise_source
        noise = source.normal(shape, x.device, x.dtype).expand(x.shape) * self.options.temperature
        if self.options.noise_dropout > 0.0:
            noise = source.dropout(noise, self.options.noise_dropout)
        return noise

    def diffuse(self, x0: Tensor, k: int, noise: Tensor | None = None) -> Tensor:
        """Clean x0 brought to the noise level of step k."""
        noise = self.options.noise_source.normal_like(x0) if noise is None else noise
        return self.alpha[k].sqrt() * x0 + (1 - self.alpha[k]).sqrt() * noise

    def starts_from_noise(self, k: int) -> bool:
        """Whether step k starts where no signal is left, as in a schedule with zero terminal SNR."""
        return self.grid.alphas[k] == 0.0  # the host's table, so that no step waits for the device


def dynamic_threshold(x0: Tensor, share: float) -> Tensor:
    """x0 (B, C, H, W) clipped to [-s, s] and divided by s, where s >= 1 is the magnitude that `share` of a sample stay below.

    Dynamic thresholding, Imagen (arXiv 2205.11487), section 2.3.
    """
    magnitudes = x0.flatten(1).abs().float().sort(dim=1).values  # sorted, since torch.quantile refuses large pictures
    index = max(0, int(np.ceil(share * magnitudes.shape[1])) - 1)
    s = magnitudes[:, index].clamp(min=1.0).to(x0.dtype)[:, None, None, None]
    return torch.maximum(torch.minimum(x0, s), -s) / s
