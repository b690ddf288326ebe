"""Gaussian diffusion of a model: schedule buffers, the forward process and its posterior."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.modules.diffusionmodules.parameterization import get_parameterization
from ldm.modules.diffusionmodules.schedule import Schedule, extract_into_tensor, make_beta_schedule
from ldm.modules.dtype import Float32Tables
from ldm.rng import Purpose, normal_like

logger = logging.getLogger(__name__)


class Gaussian(NamedTuple):
    """Mean (B, C, H, W), variance and log-variance (B, 1, 1, 1) of a normal distribution."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class GaussianDiffusion(Float32Tables):
    """Mixin with q(x_t | x_0), q(x_{t-1} | x_t, x_0) and their tables (DDPM, arXiv 2006.11239).

    Tables are float32 buffers under their published names, in every precision, computed in float64. `lvlb_weights`, the
    weight of each timestep in the variational bound, is not saved, as published.
    """

    parameterization: str
    v_posterior: float
    num_timesteps: int
    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    posterior_variance: Tensor
    posterior_mean_coef1: Tensor
    lvlb_weights: Tensor
    logvar: Tensor  # (T,) log-variance of the network's error, see loss_weighting

    def register_schedule(
        self,
        given_betas: Sequence[float] | np.ndarray | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        zero_terminal_snr: bool = False,
    ) -> None:
        """Register the tables of a named beta schedule, or of given betas.

        `zero_terminal_snr` rescales it so that no signal is left at the last timestep, whatever schedule a weights
        file holds. Raises ValueError unless the network then predicts v or x0.
        """
        if zero_terminal_snr and self.parameterization == "eps":
            raise ValueError(
                "zero_terminal_snr: the last timestep is pure noise; set parameterization v or x0, not eps"
            )
        if given_betas is None:
            if linear_start > linear_end and beta_schedule != "cosine":
                raise ValueError(f"linear_start {linear_start}: expected at most linear_end, which is {linear_end}")
            given_betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        if len(given_betas) == 0:
            raise ValueError("given_betas []: expected at least one beta")
        schedule = Schedule.from_betas(given_betas, self.v_posterior, zero_terminal_snr)
        self.num_timesteps = len(schedule)
        self.linear_start, self.linear_end = linear_start, linear_end
        for name, table in schedule.tables().items():
            self.register_buffer(name, _float32(table))
        self.register_buffer("lvlb_weights", _float32(lvlb_weights(schedule, self.parameterization)), persistent=False)
        if zero_terminal_snr:
            self.register_load_state_dict_post_hook(lambda module, keys: _restore_tables(module, schedule))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load all but tables in 16 bits, as runs with weights in 16 bits saved them: the config's are exact."""
        for name, table in self._buffers.items():
            saved = state_dict.get(f"{prefix}{name}")
            if table is not None and table.ndim and saved is not None and saved.itemsize < table.itemsize:
                state_dict[f"{prefix}{name}"] = table
        super()._load_from_state_dict(state_dict, prefix, *args)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> Gaussian:
        """Return q(x_t | x_0) at t (B,), DDPM eq. 4."""
        variance = 1.0 - self._at("alphas_cumprod", t, x_start)
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        return Gaussian(mean, variance, self._at("log_one_minus_alphas_cumprod", t, x_start))

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Sample x_t ~ q(x_t | x_0): x_start (B, C, H, W), t (B,) int64 in [0, T) -> (B, C, H, W)."""
        noise = normal_like(x_start, Purpose.NOISE) if noise is None else noise
        alpha, sigma = self._alpha_sigma(t, x_start)
        return alpha * x_start + sigma * noise

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at t (B,), (B,)."""
        return (self.alphas_cumprod[t] / (1.0 - self.alphas_cumprod[t])).log()

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """Return q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7."""
        mean = self._at("posterior_mean_coef1", t, x_t) * x_start + self._at("posterior_mean_coef2", t, x_t) * x_t
        log_variance = self._at("posterior_log_variance_clipped", t, x_t)
        return Gaussian(mean, self._at("posterior_variance", t, x_t), log_variance)

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_0 from x_t and its noise."""
        recip, recipm1 = (self._at(f"sqrt_{name}_alphas_cumprod", t, x_t) for name in ("recip", "recipm1"))
        return recip * x_t - recipm1 * noise

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the v target at clean x (B, C, H, W) and t (B,)."""
        return get_parameterization("v").target(x, noise, *self._alpha_sigma(t, x))

    def training_target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the target of the network for x_t made of x_start and noise."""
        return get_parameterization(self.parameterization).target(x_start, noise, *self._alpha_sigma(t, x_start))

    def _alpha_sigma(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scales at t (B,), each (B, 1, 1, 1)."""
        return self._at("sqrt_alphas_cumprod", t, x), self._at("sqrt_one_minus_alphas_cumprod", t, x)

    def _at(self, table: str, t: Tensor, x: Tensor) -> Tensor:
        return extract_into_tensor(getattr(self, table), t, x.shape)  # (B, 1, 1, 1)


def _restore_tables(module: GaussianDiffusion, schedule: Schedule) -> None:
    # A weights file brings the schedule of its own training; fine-tuning would lose its zero terminal SNR.
    if float(module.alphas_cumprod[-1]) == 0.0:
        return
    logger.info("zero_terminal_snr: using the schedule of the config, not that of the weights file")
    for name, table in schedule.tables().items():
        setattr(module, name, _float32(table).to(module.alphas_cumprod.device))


def lvlb_weights(schedule: Schedule, parameterization: str) -> np.ndarray:
    """Weight of each timestep's squared error in the variational bound, (T,) float64 (DDPM eq. 12, per sample).

    For x0 the published weight divides by 2 - alphas_cumprod where the bound has 2 (1 - alphas_cumprod); the published
    values hold. For v the weight is 1.
    """
    acp = schedule.alphas_cumprod
    with np.errstate(divide="ignore", invalid="ignore"):
        if parameterization == "eps":
            weights = schedule.betas**2 / (2 * schedule.posterior_variance * (1 - schedule.betas) * (1 - acp))
        elif parameterization == "x0":
            weights = 0.5 * np.sqrt(acp) / (2.0 - acp)
        else:
            weights = np.ones_like(acp)
    weights[0] = weights[min(1, len(weights) - 1)]  # the posterior's variance is 0 at the first step
    return np.nan_to_num(weights, posinf=0.0)


def _float32(table: np.ndarray) -> Tensor:
    # from_numpy stays on the CPU under `with torch.device("meta")`, so a model built there keeps its real schedule.
    return torch.from_numpy(table.astype(np.float32))
