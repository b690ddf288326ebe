"""Noise schedules: tables derived from the betas, and the timesteps of samplers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ldm.config.beta_schedule import make_beta_schedule as make_beta_schedule

logger = logging.getLogger(__name__)


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Rescale the betas (T,) so that no signal is left at the last timestep (arXiv 2305.08891, algorithm 1).

    The first beta stays; the last becomes 1. ValueError for fewer than 2 timesteps.
    """
    if len(betas) < 2:
        raise ValueError(f"zero_terminal_snr needs at least 2 timesteps, got {len(betas)}")
    alpha = np.sqrt(np.cumprod(1 - np.asarray(betas, dtype=np.float64)))
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return 1 - alpha**2 / np.append(1.0, alpha[:-1] ** 2)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tables of the Gaussian diffusion, each (T,) float64 (DDPM, arXiv 2006.11239, section 2).

    `v_posterior` interpolates the reverse variance between the true posterior's (0) and beta (1). With
    `zero_terminal_snr` the last beta may be 1; tables that divide by alphas_cumprod are infinite there.
    """

    betas: np.ndarray
    v_posterior: float = 0.0
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        below_one = self.betas < 1
        if self.zero_terminal_snr:
            below_one[-1:] |= self.betas[-1:] == 1
        if self.betas.ndim != 1 or not (below_one & (self.betas >= 0)).all():
            raise ValueError(f"betas must be (T,) with values in [0, 1), got shape {self.betas.shape}")

    @classmethod
    def from_betas(
        cls, betas: Sequence[float] | np.ndarray | Tensor, v_posterior: float = 0.0, zero_terminal_snr: bool = False
    ) -> Schedule:
        """Build the tables from a list, array or tensor of betas; `zero_terminal_snr` rescales them."""
        schedule = cls(np.asarray(betas, dtype=np.float64), v_posterior)
        return cls(rescale_zero_terminal_snr(schedule.betas), v_posterior, True) if zero_terminal_snr else schedule

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        return np.cumprod(1 - self.betas)

    @property
    def alphas_cumprod_prev(self) -> np.ndarray:
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0), eq. 7."""
        true_posterior = self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        return (1 - self.v_posterior) * true_posterior + self.v_posterior * self.betas

    def tables(self) -> dict[str, np.ndarray]:
        """All tables by the names of the buffers in published checkpoints."""
        acp, acp_prev, alphas = self.alphas_cumprod, self.alphas_cumprod_prev, 1 - self.betas
        with np.errstate(divide="ignore"):
            return {
                "betas": self.betas,
                "alphas_cumprod": acp,
                "alphas_cumprod_prev": acp_prev,
                "sqrt_alphas_cumprod": np.sqrt(acp),
                "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - acp),
                "log_one_minus_alphas_cumprod": np.log(1 - acp),
                "sqrt_recip_alphas_cumprod": np.sqrt(1 / acp),
                "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / acp - 1),
                "posterior_variance": self.posterior_variance,
                # Clipped, because the variance is 0 at the first timestep.
                "posterior_log_variance_clipped": np.log(np.maximum(self.posterior_variance, 1e-20)),
                "posterior_mean_coef1": self.betas * np.sqrt(acp_prev) / (1 - acp),
                "posterior_mean_coef2": (1 - acp_prev) * np.sqrt(alphas) / (1 - acp),
            }


def check_steps(steps: int, num_timesteps: int) -> None:
    """Raise ValueError unless `steps` is in [1, num_timesteps]."""
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"{steps} sampling steps: choose 1 to {num_timesteps}, the model's number of timesteps")


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = True
) -> np.ndarray:
    """Return the timesteps of a sampler, increasing, (S,) int64 in [0, T).

    `uniform` is the published spacing 1, 1 + T/S, ... if S divides T and S < T, else exactly S strictly increasing
    timesteps. `quad`, as published, repeats small timesteps. `trailing` ends at T - 1, as zero terminal SNR needs
    (arXiv 2305.08891, table 2). ValueError for an unknown spacing, or S outside [1, T].
    """
    S, T = int(num_ddim_timesteps), int(num_ddpm_timesteps)
    check_steps(S, T)
    if ddim_discr_method == "uniform":
        timesteps = np.arange(S, dtype=np.int64) * T // S
        if S < T:
            timesteps += 1  # the published shift, which keeps the last step away from t = 0
    elif ddim_discr_method == "quad":
        timesteps = (np.linspace(0, np.sqrt(T * 0.8), S) ** 2).astype(np.int64) + 1
        timesteps = np.minimum(timesteps, T - 1)  # reached only if T < 10
    elif ddim_discr_method == "trailing":
        timesteps = np.round(np.arange(1, S + 1) * (T / S)).astype(np.int64) - 1
    else:
        raise ValueError(f"ddim_discretize {ddim_discr_method!r}: choose one of uniform, quad, trailing")
    if verbose:
        logger.info("%d sampling steps, timesteps %d to %d", S, timesteps[-1], timesteps[0])
    return timesteps


Table = TypeVar("Table", np.ndarray, Tensor)


class DDIMParameters(NamedTuple, Generic[Table]):
    """DDIM's tables, each (S,), in order of increasing timesteps."""

    sigmas: Table
    alphas: Table  # products of (1 - beta)
    alphas_prev: Table


def make_ddim_sampling_parameters(
    alphacums: Table, ddim_timesteps: np.ndarray, eta: float, verbose: bool = True
) -> DDIMParameters[Table]:
    """Return the tables of DDIM's steps; `eta` 0 is deterministic, 1 is DDPM's variance (arXiv 2010.02502, eq. 16).

    alphacums: (T,), an array -> arrays in float64, a tensor -> tensors of its dtype on its device. As published,
    alphas_prev[0] is alphas_cumprod[0], not 1.
    """
    if isinstance(alphacums, Tensor):
        tables = make_ddim_sampling_parameters(alphacums.detach().cpu().double().numpy(), ddim_timesteps, eta, verbose)
        return DDIMParameters(*(torch.as_tensor(table).to(alphacums) for table in tables))
    alphacums = np.asarray(alphacums, dtype=np.float64)
    alphas = alphacums[ddim_timesteps]
    alphas_prev = np.append(alphacums[0], alphas[:-1])
    sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
    if verbose:
        logger.info("DDIM eta %g, sigma up to %.4f", eta, sigmas.max())
    return DDIMParameters(sigmas, alphas, alphas_prev)


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """Return a[t] of table `a` (T,) at timesteps t (B,), shaped (B, 1, ..., 1) to broadcast against `x_shape`."""
    return a.gather(-1, t).reshape(-1, *(1 for _ in x_shape[1:]))


def noise_like(shape: Sequence[int], device: torch.device | str, repeat: bool = False) -> Tensor:
    """Return standard normal noise of `shape`, the same for every sample of the batch if `repeat`."""
    if repeat:
        return torch.randn((1, *shape[1:]), device=device).repeat(shape[0], *(1 for _ in shape[1:]))
    return torch.randn(tuple(shape), device=device)
