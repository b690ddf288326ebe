"""The one sampling loop: noise, mask blend, guidance, callbacks and img2img; a sampler is its `step`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.diffusion.conditioning import Conditioning, condition_batch_size
from ldm.models.diffusion.guidance import guided_output
from ldm.modules.diffusionmodules.parameterization import get_parameterization


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
    """What a caller may ask of a run beside its condition."""

    temperature: float = 1.0
    noise_dropout: float = 0.0
    repeat_noise: bool = False
    quantize_x0: bool = False
    clip_denoised: bool = False
    score_corrector: Any = None
    corrector_kwargs: Mapping[str, Any] = field(default_factory=dict)


class Run:
    """The values of one sampling run: tables on the latent's device, the condition, and the history of multistep solvers."""

    def __init__(
        self, model: Any, grid: Grid, x: Tensor, cond: Conditioning, uncond: Conditioning, scale: float, options: Options
    ) -> None:
        self.model, self.cond, self.uncond, self.scale, self.options = model, cond, uncond, scale, options
        self.grid = grid
        self.parameterization = get_parameterization(model.parameterization)
        # Whole tables move once, so that no step waits for the device.
        whole = np.issubdtype(grid.t.dtype, np.integer)
        self.t = torch.as_tensor(grid.t, dtype=torch.int64 if whole else torch.float32, device=x.device)
        tables = {"alpha": grid.alphas, "alpha_prev": grid.alphas_prev, "sigma": grid.sigmas, **grid.coefs}
        self.coefs = {name: torch.as_tensor(table, dtype=torch.float32, device=x.device) for name, table in tables.items()}
        self.alpha, self.alpha_prev, self.sigma = self.coefs["alpha"], self.coefs["alpha_prev"], self.coefs["sigma"]
        self.history: list[Tensor] = []

    def network(self, x: Tensor, k: int) -> Tensor:
        """Guided network output at step k: (B, C, H, W) -> (B, C, H, W)."""
        t = self.t[k].expand(x.shape[0])
        out = guided_output(self.model, x, t, self.cond, self.uncond, self.scale)
        if self.options.score_corrector is not None:
            out = self.options.score_corrector.modify_score(self.model, out, x, t, self.cond, **self.options.corrector_kwargs)
        return out

    def predict(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The noise and the clean signal that the network sees in x at step k."""
        out, alpha, sigma = self.network(x, k), self.alpha[k].sqrt(), (1 - self.alpha[k]).sqrt()
        eps = self.parameterization.to_eps(x, out, alpha, sigma)
        return eps, self.refine(self.parameterization.to_x0(x, out, alpha, sigma))

    def refine(self, x0: Tensor) -> Tensor:
        """Predicted x_0 after the clipping and quantization that were asked for."""
        if self.options.clip_denoised:
            x0 = x0.clamp(-1.0, 1.0)
        if self.options.quantize_x0:
            x0 = self.model.first_stage_model.quantize(x0)[0]
        return x0

    def noise(self, x: Tensor) -> Tensor:
        """The step's noise, drawn even where its scale is 0 so that a seed gives the published image."""
        shape = (1, *x.shape[1:]) if self.options.repeat_noise else x.shape
        noise = torch.randn(shape, device=x.device, dtype=x.dtype).expand(x.shape) * self.options.temperature
        if self.options.noise_dropout > 0.0:
            noise = torch.nn.functional.dropout(noise, p=self.options.noise_dropout)
        return noise

    def diffuse(self, x0: Tensor, k: int, noise: Tensor | None = None) -> Tensor:
        """Clean x0 brought to the noise level of step k."""
        noise = torch.randn_like(x0) if noise is None else noise
        return self.alpha[k].sqrt() * x0 + (1 - self.alpha[k]).sqrt() * noise


class Samples(NamedTuple):
    """Final latent (B, C, H, W) and {"x_inter": [...], "pred_x0": [...]}, the start and every `log_every_t`-th step."""

    samples: Tensor
    intermediates: dict[str, list[Tensor]]


class Sampler(ABC):
    """Base of all samplers. It stores the model alone; a run's tables and history live in its `Run`.

    Of the model it uses `num_timesteps, parameterization, device, alphas_cumprod, apply_model` (and
    `first_stage_model.quantize` for `quantize_x0`), so anything that has these can be sampled.
    """

    blends_mask_after_step = False

    def __init__(self, model: Any, schedule: str = "linear") -> None:
        if schedule != "linear":
            raise ValueError(f"schedule {schedule!r}: only 'linear' exists; the betas are the model's own")
        self.model = model

    @abstractmethod
    def grid(self, S: int, eta: float = 0.0, discretize: str = "uniform") -> Grid:
        """The steps of a run of S steps; ValueError where S or eta cannot be honoured."""

    @abstractmethod
    def step(self, x: Tensor, k: int, run: Run) -> tuple[Tensor, Tensor]:
        """One move from step k to k-1 -> (x_prev, predicted x_0), both (B, C, H, W)."""

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
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        ddim_discretize: str = "uniform",
    ) -> Samples:
        """Draw `batch_size` latents of `shape` (C, H, W) in S steps.

        `x_T` (B, C, H, W) replaces the initial noise. Where `mask` (B, 1, H, W) is 1 the result keeps `x0`.
        `callback(i)` and `img_callback(pred_x0, i)` run after step i. `verbose` shows a progress bar.
        Raises ValueError for an S, eta, shape or condition that cannot be honoured.
        """
        if normals_sequence is not None:
            raise ValueError("normals_sequence is not supported; pass x_T for the initial noise")
        if len(shape) != 3:
            raise ValueError(f"shape {tuple(shape)}: expected (channels, height, width) of one latent")
        grid = self.grid(S, eta, ddim_discretize)
        for name, cond in (("conditioning", conditioning), ("unconditional_conditioning", unconditional_conditioning)):
            size = condition_batch_size(cond)
            if size is not None and size != batch_size:
                raise ValueError(f"{name} is for {size} samples, batch_size is {batch_size}")
        x = torch.randn((batch_size, *shape), device=self.model.device) if x_T is None else x_T
        if tuple(x.shape) != (batch_size, *shape):
            raise ValueError(f"x_T has shape {tuple(x.shape)}, expected {(batch_size, *shape)}")
        options = Options(
            temperature=temperature,
            noise_dropout=noise_dropout,
            quantize_x0=quantize_x0,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs or {},
        )
        run = Run(self.model, grid, x, conditioning, unconditional_conditioning, unconditional_guidance_scale, options)
        return self.loop(x, run, len(grid.t), mask, x0, callback, img_callback, log_every_t, verbose)

    def loop(
        self,
        x: Tensor,
        run: Run,
        start: int,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        log_every_t: int = 100,
        verbose: bool = True,
    ) -> Samples:
        """Walk the last `start` steps of the run's grid down to the clean latent."""
        if mask is not None:
            if x0 is None:
                raise ValueError("mask needs x0, the latent that is kept where the mask is 1")
            if mask.shape[-2:] != x0.shape[-2:]:
                raise ValueError(f"mask {tuple(mask.shape)} and x0 {tuple(x0.shape)} differ in height or width")
        intermediates: dict[str, list[Tensor]] = {"x_inter": [x], "pred_x0": [x]}
        steps = tqdm(range(start), desc=type(self).__name__, disable=not verbose, leave=False)
        for i in steps:
            k = start - 1 - i
            if mask is not None and not self.blends_mask_after_step:
                x = run.diffuse(x0, k) * mask + (1.0 - mask) * x
            x, pred_x0 = self.step(x, k, run)
            if mask is not None and self.blends_mask_after_step:
                x = run.diffuse(x0, k) * mask + (1.0 - mask) * x
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(pred_x0, i)
            if k % log_every_t == 0 or i == 0:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(pred_x0)
        return Samples(x, intermediates)


