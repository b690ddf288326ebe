"""The values of one sampling run: its steps, its options, and the guided prediction at each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.samplers.guidance import GuidedNetwork, dynamic_threshold
from ldm.models.diffusion.samplers.noise import PUBLISHED_NOISE, NoiseSource
from ldm.modules.diffusionmodules.parameterization import get_parameterization


class DiffusionModel(Protocol):
    """The members of a model that samplers and pipelines use.

    `alphas_cumprod`, `alphas_cumprod_prev` and `betas` are (T,) tables, `parameterization` is `eps`, `x0` or `v`.
    `quantize_x0` also needs `first_stage_model.quantize`; the ancestral sampler reads `v_posterior` if present.
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


class ScoreCorrector(Protocol):
    """Correction of the predicted noise at each step, e.g. classifier guidance."""

    def modify_score(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the noise to use instead of eps in modify_score(model, eps, x, t, cond, **corrector_kwargs)."""


class Steps(NamedTuple):
    """The S steps of a run, from the smallest timestep up, each table (S,) float64.

    `t` is the network's timestep, fractional only for continuous-time samplers. `alphas` and `alphas_prev` are products
    of (1 - beta) at the start and the end of each step, `sigmas` its noise scale, `coefs` the sampler's own tables.
    """

    t: np.ndarray
    alphas: np.ndarray
    alphas_prev: np.ndarray
    sigmas: np.ndarray
    coefs: Mapping[str, np.ndarray] = MappingProxyType({})


@dataclass(frozen=True)
class SamplingOptions:
    """Options of a run besides its steps and its condition; ValueError for a value out of range."""

    temperature: float = 1.0  # scale of every step's noise
    noise_dropout: float = 0.0  # probability with which a value of that noise is zeroed
    repeat_noise: bool = False  # the same noise for every sample of the batch
    quantize_x0: bool = False  # snap the predicted x_0 to the first stage's codebook
    clip_denoised: bool = False  # clip the predicted x_0 to [-1, 1]
    score_corrector: ScoreCorrector | None = None
    corrector_kwargs: Mapping[str, Any] | None = None
    guidance_rescale: float = 0.0  # phi of arXiv 2305.08891, section 3.4: 0 is off, 0.7 is usual
    guidance_interval: Sequence[float] = ()  # guide at noise levels between two (arXiv 2404.07724); () is at all
    image_guidance_scale: float = 1.0  # s_I of InstructPix2Pix, eq. 3; 1 is off
    dynamic_threshold: float | None = None  # quantile of Imagen, section 2.3, e.g. 0.995; None is off
    noise_source: NoiseSource = PUBLISHED_NOISE  # of every random number of the run

    def __post_init__(self) -> None:
        if not 0.0 <= self.noise_dropout < 1.0:
            raise ValueError(f"noise_dropout {self.noise_dropout}: choose a probability in [0, 1)")
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise ValueError(f"guidance_rescale {self.guidance_rescale}: choose 0 (off) to 1; 0.7 is usual")
        if (ends := self.guidance_interval) and not (len(ends) == 2 and 0.0 <= ends[0] < ends[1]):
            raise ValueError(
                f"guidance_interval {[*ends]}: choose two noise levels LOW < HIGH from 0 on, e.g. 0.3, 5.4"
            )
        if self.dynamic_threshold is not None and not 0.0 < self.dynamic_threshold <= 1.0:
            raise ValueError(f"dynamic_threshold {self.dynamic_threshold}: choose None (off) or a quantile in (0, 1]")


class SamplingRun:
    """The values of one run: coefficients by step, the condition, and the history of multistep samplers.

    The coefficients are float32 values as Python numbers, so a step neither waits for the device nor uploads:
    `signal` and `noise_level` are the scales of x_0 and eps at the start of each step, `signal_prev` and
    `noise_level_prev` those at its end, `sigma` the step's noise scale, `coefs` the sampler's own tables.
    """

    def __init__(
        self,
        model: DiffusionModel,
        steps: Steps,
        x: Tensor,
        cond: Conditioning,
        uncond: Conditioning,
        scale: float,
        options: SamplingOptions,
    ) -> None:
        self.model, self.steps, self.options = model, steps, options
        scales = scale, options.guidance_rescale, options.image_guidance_scale
        self.network = GuidedNetwork(model.apply_model, cond, uncond, *scales)
        self.parameterization = get_parameterization(model.parameterization)
        t_dtype = torch.int64 if np.issubdtype(steps.t.dtype, np.integer) else torch.float32
        t = torch.as_tensor(steps.t, dtype=t_dtype, device=x.device)  # moves once
        self.t = t[:, None].expand(len(t), len(x))  # (S, B)
        self.signal, self.noise_level = _scales(steps.alphas)
        self.signal_prev, self.noise_level_prev = _scales(steps.alphas_prev)
        self.sigma = _float32(steps.sigmas).tolist()
        self.coefs: dict[str, Any] = {name: _float32(table).tolist() for name, table in steps.coefs.items()}
        self.history: list[Tensor] = []
        self.known: tuple[Tensor, Tensor] | None = None  # (mask, x_0): the prediction is x_0 where the mask is 1

    # Read-only: the network has joined the conditions to one batch.
    @property
    def cond(self) -> Conditioning:
        return self.network.cond

    @property
    def uncond(self) -> Conditioning:
        return self.network.uncond

    @property
    def scale(self) -> float:
        return self.network.scale

    def predict(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the guided network's (eps, x_0) for x at step k, each (B, C, H, W)."""
        alpha, sigma, t = self.signal[k], self.noise_level[k], self.t[k]
        out = self.network(x, t, self.guides(k))
        eps, x0 = self.parameterization.to_eps(x, out, alpha, sigma), self.parameterization.to_x0(x, out, alpha, sigma)
        corrector = self.options.score_corrector
        if corrector is not None and not self.starts_from_noise(k):  # in pure noise there is no signal to correct
            eps = corrector.modify_score(self.model, eps, x, t, self.cond, **(self.options.corrector_kwargs or {}))
            x0 = (x - sigma * eps) / alpha
        x0 = self.refine(x0)
        if self.known is not None:
            mask, known = self.known
            x0 = known * mask + (1.0 - mask) * x0
        if self.options.dynamic_threshold is not None or self.known is not None:
            eps = (x - alpha * x0) / sigma  # the noise that is consistent with the changed prediction
        return eps, x0

    def predict_eps(self, x: Tensor, k: int) -> Tensor:
        """Return eps of `predict`, without the work of x_0 if nothing changes it there."""
        if self.options.score_corrector or self.options.dynamic_threshold is not None or self.known is not None:
            return self.predict(x, k)[0]
        out = self.network(x, self.t[k], self.guides(k))
        return self.parameterization.to_eps(x, out, self.signal[k], self.noise_level[k])

    def guides(self, k: int) -> bool:
        """Return whether the noise level of step k, sqrt(1 / alpha - 1), is in `guidance_interval`."""
        if not self.options.guidance_interval:
            return True
        (low, high), alpha = self.options.guidance_interval, self.steps.alphas[k]
        return alpha * low**2 < 1.0 - alpha <= alpha * high**2  # finite for pure noise, too

    def refine(self, x0: Tensor) -> Tensor:
        """Threshold, clip and quantize the predicted x_0 as the options say."""
        if self.options.dynamic_threshold is not None:
            x0 = dynamic_threshold(x0, self.options.dynamic_threshold)
        if self.options.clip_denoised:
            x0 = x0.clamp(-1.0, 1.0)
        if self.options.quantize_x0:
            first_stage: Any = getattr(self.model, "first_stage_model", None)
            if not hasattr(first_stage, "quantize"):
                raise ValueError("quantize_x0 needs a model whose first stage has a codebook (VQModelInterface)")
            x0 = first_stage.quantize(x0)[0]
        return x0

    def noise(self, x: Tensor) -> Tensor:
        """Return the step's noise; call it even where its scale is 0, so that a seed gives the published image."""
        options = self.options
        shape = (1, *x.shape[1:]) if options.repeat_noise else x.shape
        noise = options.noise_source.normal(shape, x.device, x.dtype)
        if options.repeat_noise:
            noise = noise.expand(x.shape)
        if options.temperature != 1.0:
            noise = noise * options.temperature
        return options.noise_source.dropout(noise, options.noise_dropout) if options.noise_dropout > 0.0 else noise

    def blend(self, x: Tensor, mask: Tensor, x0: Tensor, k: int) -> Tensor:
        """Replace x by x0 at the noise level of step k, with new noise, where the mask is 1."""
        noise = self.options.noise_source.normal_like(x0)
        noised = self.signal[k] * x0 + self.noise_level[k] * noise
        return noised * mask + (1.0 - mask) * x

    def starts_from_noise(self, k: int) -> bool:
        """Return whether step k starts from pure noise, as in a schedule with zero terminal SNR."""
        return self.steps.alphas[k] == 0.0


def _float32(table: np.ndarray) -> np.ndarray:
    return np.asarray(table, dtype=np.float32)


def _scales(alphas: np.ndarray) -> tuple[list[float], list[float]]:
    """Scales of signal and noise, sqrt(alpha) and sqrt(1 - alpha), in float32 arithmetic as published."""
    return np.sqrt(_float32(alphas)).tolist(), np.sqrt(1 - _float32(alphas)).tolist()
