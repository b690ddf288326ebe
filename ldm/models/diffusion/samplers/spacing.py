"""Noise levels between the chain's timesteps, for samplers that walk in continuous time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from ldm.modules.diffusionmodules.schedule import make_ddim_timesteps

CONTINUOUS_GRIDS = ("uniform", "logsnr", "karras", "trailing")
RHO = 7.0  # EDM, table 1


class Levels(NamedTuple):
    """Noise levels from the smallest up: `t` for the network and products of (1 - beta), float64.

    Where a run ends above timestep 0 there is one more of `alphas` than of `t`, in front: the end.
    """

    t: np.ndarray
    alphas: np.ndarray

    @property
    def alpha(self) -> np.ndarray:
        """Scale of the signal."""
        return np.sqrt(self.alphas)

    @property
    def sigma(self) -> np.ndarray:
        """Scale of the noise, alpha^2 + sigma^2 = 1."""
        return np.sqrt(1 - self.alphas)

    @property
    def lam(self) -> np.ndarray:
        """Half the logarithm of the signal-to-noise ratio; infinite where there is no noise, or no signal."""
        with np.errstate(divide="ignore"):
            return (np.log(self.alphas) - np.log1p(-self.alphas)) / 2


def chain_alphas(model: object) -> np.ndarray:
    """(T,) float64 products of (1 - beta) of a model."""
    alphas_cumprod: Tensor = model.alphas_cumprod
    return np.asarray(alphas_cumprod.cpu(), dtype=np.float64)


def noise_levels(name: str, count: int, alphas_cumprod: np.ndarray) -> Levels:
    """`count` levels between timestep 0 and the chain's last one, both included (a single one is the last).

    `uniform` in time, `logsnr` uniform in lam (DPM-Solver, arXiv 2206.00927), `karras` uniform in
    (sigma / alpha)^(1/7) (EDM, arXiv 2206.00364, eq. 5), or `trailing` timesteps (Lin et al. 2023, arXiv 2305.08891,
    table 2), which need not reach 0. Between timesteps log alpha is linear, as in the published DPM-Solver.
    """
    T = len(alphas_cumprod)
    if name == "trailing":
        t = make_ddim_timesteps("trailing", count, T, verbose=False)
        return Levels(t, alphas_cumprod[t])
    if alphas_cumprod[-1] == 0.0:
        raise ValueError(
            f"ddim_discretize {name!r}: this schedule has zero terminal SNR, whose logarithm is infinite; choose 'trailing'"
        )
    log_alphas = np.log(alphas_cumprod)
    if name == "uniform":
        t = np.linspace(T - 1, 0, count)[::-1].copy()
        return Levels(t, np.exp(np.interp(t, np.arange(T), log_alphas)))
    ends = Levels(np.array([T - 1, 0]), alphas_cumprod[[-1, 0]])
    if name == "logsnr":
        lam = np.linspace(*ends.lam, count)[::-1]
    elif name == "karras":
        lam = -RHO * np.log(np.linspace(*np.exp(-ends.lam / RHO), count)[::-1])
    else:
        raise ValueError(f"ddim_discretize {name!r}: choose one of {', '.join(CONTINUOUS_GRIDS)}")
    alphas = 1 / (1 + np.exp(-2 * lam))
    return Levels(np.interp(np.log(alphas), log_alphas[::-1], np.arange(T)[::-1]), alphas)


def levels_down_to_first(name: str, S: int, alphas_cumprod: np.ndarray) -> Levels:
    """The starts of S steps, and in front of their alphas the end, timestep 0: where the published DPM-Solver stops."""
    if name == "trailing":
        starts = noise_levels(name, S, alphas_cumprod)
        return Levels(starts.t, np.append(alphas_cumprod[0], starts.alphas))
    levels = noise_levels(name, S + 1, alphas_cumprod)
    return Levels(levels.t[1:], levels.alphas)
