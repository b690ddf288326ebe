"""The one sampling loop: noise, mask blend, guidance, callbacks and img2img; a sampler is its grid and its `step`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.diffusion.conditioning import Conditioning, condition_batch_size
from ldm.models.diffusion.samplers.denoiser import Grid, Options, Run
from ldm.models.diffusion.samplers.noise import PUBLISHED_NOISE, NoiseSource
from ldm.modules.diffusionmodules.schedule import check_steps


class Samples(NamedTuple):
    """Final latent (B, C, H, W) and {"x_inter": [...], "pred_x0": [...]}, the start and every `log_every_t`-th step."""

    samples: Tensor
    intermediates: dict[str, list[Tensor]]


class Sampler(ABC):
    """Base of all samplers. It stores the model alone (and what `make_schedule` fixes); a run's values live in its `Run`.

    Of the model it uses `num_timesteps, parameterization, device, betas, alphas_cumprod, alphas_cumprod_prev, apply_model`
    (and `first_stage_model.quantize` for `quantize_x0`), so anything that has these can be sampled. The ancestral chain also takes
    `v_posterior`, its choice of the reverse variance, from a model that has one.
    """

    grids: ClassVar[tuple[str, ...]] = ("uniform", "quad", "trailing")  # what `ddim_discretize` may be
    default_eta: ClassVar[float] = 0.0
    takes_eta: ClassVar[bool] = False  # whether eta may differ from the default
    adds_noise: ClassVar[bool] = False  # whether steps draw noise that temperature and noise_dropout could change
    # Where a mask keeps x0: in the latent `before` or `after` a step, with new noise each time, as published for DDIM, PLMS and the
    # ancestral chain; elsewhere in the `prediction`, since solvers that extrapolate need predictions without such jumps.
    mask_blend: ClassVar[str] = "prediction"
    _scheduled: Grid | None = None
    _eta: float = 0.0

    def __init__(self, model: Any, schedule: str = "linear") -> None:
        if schedule != "linear":
            raise ValueError(f"schedule {schedule!r}: only 'linear' exists; the betas are the model's own")
        self.model = model

    @abstractmethod
    def make_grid(self, S: int, eta: float, discretize: str) -> Grid:
        """The S steps of a run, for arguments that are in range."""

    @abstractmethod
    def step(self, x: Tensor, k: int, run: Run) -> tuple[Tensor, Tensor]:
        """One move from step k to k-1 -> (x_prev, predicted x_0), both (B, C, H, W)."""

    def grid(self, S: int, eta: float | None = None, discretize: str = "uniform") -> Grid:
        """The steps of a run of S steps; ValueError where S, eta or the name of the grid cannot be honoured."""
        name = type(self).__name__
        check_steps(S, self.model.num_timesteps)
        if discretize not in self.grids:
            raise ValueError(
                f"ddim_discretize {discretize!r}: {name} has no such grid, choose one of {', '.join(self.grids)}"
            )
        eta = self.default_eta if eta is None else eta
        if not self.takes_eta and eta != self.default_eta:
            raise ValueError(
                f"{name} has a noise of its own: eta must be {self.default_eta:g}, got {eta:g}; DDIM takes any eta"
            )
        if not (math.isfinite(eta) and eta >= 0):
            raise ValueError(f"eta {eta}: choose 0 (deterministic) to 1 (as noisy as the diffusion itself)")
        grid = self.make_grid(S, eta, discretize)
        if grid.alphas[-1] == 0.0 and self.model.parameterization == "eps":
            raise ValueError(
                "this schedule has zero terminal SNR: it starts from pure noise, which tells eps nothing; predict v or x0"
            )
        return grid

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
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        ddim_discretize: str = "uniform",
        guidance_rescale: float = 0.0,
        dynamic_threshold: float | None = None,
        noise_source: NoiseSource = PUBLISHED_NOISE,
    ) -> Samples:
        """Draw `batch_size` latents of `shape` (C, H, W) in S steps.

        `x_T` (B, C, H, W) replaces the initial noise. Where `mask` (B, 1, H, W) is 1 the result keeps `x0`.
        `callback(i)` and `img_callback(pred_x0, i)` run after step i. `verbose` shows a progress bar. `eta` None is the
        sampler's own noise, `ddim_discretize` one of its `grids`; the other options are those of `Options`.
        Raises ValueError for an S, eta, shape, option or condition that cannot be honoured.
        """
        if normals_sequence is not None:
            raise ValueError("normals_sequence is not supported; pass x_T for the initial noise")
        if len(shape) != 3:
            raise ValueError(f"shape {tuple(shape)}: expected (channels, height, width) of one latent")
        grid = self.grid(S, eta, ddim_discretize)
        options = Options(
            temperature=temperature,
            noise_dropout=noise_dropout,
            quantize_x0=quantize_x0,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs or {},
            guidance_rescale=guidance_rescale,
            dynamic_threshold=dynamic_threshold,
            noise_source=noise_source,
        )
        expected = (batch_size, *shape)
        if x_T is not None and tuple(x_T.shape) != expected:
            raise ValueError(f"x_T has shape {tuple(x_T.shape)}, expected {expected}")
        self._check_run(batch_size, conditioning, unconditional_guidance_scale, unconditional_conditioning, options)
        self._scheduled, self._eta = (
            grid,
            self.default_eta if eta is None else eta,
        )  # published: callbacks read the ddim_* tables
        x = noise_source.normal(expected, self.model.device) if x_T is None else x_T
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
            if self.mask_blend == "prediction":
                run.kept = (mask, x0)
        intermediates: dict[str, list[Tensor]] = {"x_inter": [x], "pred_x0": [x]}
        steps = tqdm(range(start), desc=type(self).__name__, disable=not verbose, leave=False)
        for i in steps:
            k = start - 1 - i
            if mask is not None and self.mask_blend == "before":
                x = run.diffuse(x0, k) * mask + (1.0 - mask) * x
            x, pred_x0 = self.step(x, k, run)
            if mask is not None and self.mask_blend == "after":
                x = run.diffuse(x0, k) * mask + (1.0 - mask) * x
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
        """Fix the steps that `stochastic_encode` and `decode` use, and the `ddim_*` tables."""
        self._eta = self.default_eta if ddim_eta is None else ddim_eta
        self._scheduled = self.grid(ddim_num_steps, self._eta, ddim_discretize)

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """x0 (B, C, H, W) brought to the noise level that `decode` starts from with t_start = t (B,), 0 to S.

        At 0 (strength 0) this is x0 itself; at S, which strength 1 asks for, it is pure noise.
        """
        alphas = self._encoding_alphas(self._grid_of(use_original_steps))
        if int(t.min()) < 0 or int(t.max()) >= len(alphas):
            raise ValueError(f"encoding step {t.tolist()}: choose 0 to {len(alphas) - 1}")
        alpha = torch.as_tensor(alphas, dtype=torch.float32, device=x0.device)[t.to(x0.device)][:, None, None, None]
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
        """Denoise a latent (B, C, H, W) over the last `t_start` steps of the schedule's grid.

        `mask` and `x0` as in `sample`; `options` are the fields of `Options`, e.g. guidance_rescale=0.7.
        """
        grid = self._grid_of(use_original_steps)
        if not 0 <= t_start <= len(grid.t):
            raise ValueError(f"t_start {t_start}: choose 0 to {len(grid.t)}")
        asked = Options(**options)
        self._check_run(len(x_latent), cond, unconditional_guidance_scale, unconditional_conditioning, asked)
        run = Run(self.model, grid, x_latent, cond, unconditional_conditioning, unconditional_guidance_scale, asked)
        return self.loop(x_latent, run, t_start, mask, x0, callback, img_callback, verbose=verbose).samples

    @property
    def ddim_timesteps(self) -> np.ndarray:
        """(S,) the schedule's timesteps, increasing; int64 but for continuous-time solvers."""
        return self._grid_of(False).t

    @property
    def ddim_alphas(self) -> Tensor:
        """(S,) products of (1 - beta) at each step."""
        return torch.as_tensor(self._grid_of(False).alphas, dtype=torch.float32, device=self.model.device)

    @property
    def ddim_alphas_prev(self) -> np.ndarray:
        """(S,) products of (1 - beta) at the step that each one leads to."""
        return self._grid_of(False).alphas_prev

    @property
    def ddim_sigmas(self) -> Tensor:
        """(S,) noise scale of each step."""
        return torch.as_tensor(self._grid_of(False).sigmas, dtype=torch.float32, device=self.model.device)

    def _encoding_alphas(self, grid: Grid) -> np.ndarray:
        """(S + 1,) products of (1 - beta) from which 0 to S steps are left to walk."""
        return np.concatenate([[1.0], grid.alphas[:-1], [0.0]])

    def _grid_of(self, use_original_steps: bool) -> Grid:
        if use_original_steps:
            raise ValueError(
                f"use_original_steps: {type(self).__name__} walks the steps of make_schedule alone; DDIM can"
            )
        if self._scheduled is None:
            raise ValueError("call make_schedule(ddim_num_steps=...) first")
        return self._scheduled

    def _check_run(
        self, batch_size: int, cond: Conditioning, scale: float, uncond: Conditioning, options: Options
    ) -> None:
        for name, condition in (("conditioning", cond), ("unconditional_conditioning", uncond)):
            size = condition_batch_size(condition)
            if size is not None and size != batch_size:
                raise ValueError(f"{name} is for {size} samples, batch_size is {batch_size}")
        if scale != 1.0 and uncond is None:
            raise ValueError(
                f"unconditional_guidance_scale {scale:g} needs unconditional_conditioning; without it the scale must be 1"
            )
        noisy = options.temperature != 1.0 or options.noise_dropout > 0.0 or options.repeat_noise
        if noisy and not self.adds_noise:
            raise ValueError(
                f"{type(self).__name__} adds no noise that temperature, noise_dropout or repeat_noise could change"
            )
