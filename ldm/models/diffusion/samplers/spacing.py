"""Noise levels between the schedule's timesteps, for continuous-time samplers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ldm.models.diffusion.samplers.denoiser import DiffusionModel
from ldm.modules.diffusionmodules.schedule import make_ddim_timesteps

RHO = 7.0  # EDM, table 1


class NoiseLevels(NamedTuple):
    """Noise levels from the smallest up: the network's timesteps `t` and products of (1 - beta), float64.

    If a run ends above timestep 0, `alphas` has one entry more than `t`, in front: the end of the last step.
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
        """Half the log-SNR, log(alpha / sigma); infinite without noise, and minus infinite without signal."""
        with np.errstate(divide="ignore"):
            return (np.log(self.alphas) - np.log1p(-self.alphas)) / 2

    def first_order(self) -> dict[str, np.ndarray]:
        """Coefficients of the steps that are exact for a constant prediction m: x_k = keep x_{k+1} + move m."""
        h = self.lam[:-1] - self.lam[1:]
        return {"keep": self.sigma[:-1] / self.sigma[1:], "move": -self.alpha[:-1] * np.expm1(-h)}


def model_alphas_cumprod(model: DiffusionModel) -> np.ndarray:
    """The model's products of (1 - beta), (T,) float64 on the host."""
    return np.asarray(model.alphas_cumprod.cpu(), dtype=np.float64)


def noise_levels(spacing: str, count: int, alphas_cumprod: np.ndarray) -> NoiseLevels:
    """`count` levels from timestep 0 to the last timestep, both included; a single one is the last timestep.

    `uniform` in time, `logsnr` uniform in lam (DPM-Solver, arXiv 2206.00927), `karras` uniform in
    (sigma / alpha)^(1/7) (EDM, arXiv 2206.00364, eq. 5), or `trailing` timesteps (arXiv 2305.08891, table 2), which
    may end above 0. Between timesteps log alpha is linear, as in the published DPM-Solver. ValueError for another name.
    """
    T = len(alphas_cumprod)
    if spacing == "trailing":
        t = make_ddim_timesteps("trailing", count, T, verbose=False)
        return NoiseLevels(t, alphas_cumprod[t])
    if alphas_cumprod[-1] == 0.0:
        raise ValueError(
            f"ddim_discretize {spacing!r}: the log-SNR of a zero-terminal-SNR schedule is infinite; choose 'trailing'"
        )
    log_alphas = np.log(alphas_cumprod)
    if spacing == "uniform":
        t = np.linspace(T - 1, 0, count)[::-1].copy()
        return NoiseLevels(t, np.exp(np.interp(t, np.arange(T), log_alphas)))
    lam_min, lam_max = NoiseLevels(np.array([T - 1, 0]), alphas_cumprod[[-1, 0]]).lam.tolist()
    if spacing == "logsnr":
        lam = np.linspace(lam_min, lam_max, count)[::-1]
    elif spacing == "karras":
        sigma_max, sigma_min = np.exp(-np.array([lam_min, lam_max]) / RHO).tolist()  # to the power 1 / RHO
        lam = -RHO * np.log(np.linspace(sigma_max, sigma_min, count)[::-1])
    else:
        raise ValueError(f"ddim_discretize {spacing!r}: choose one of uniform, logsnr, karras, trailing")
    alphas = 1 / (1 + np.exp(-2 * lam))
    return NoiseLevels(np.interp(np.log(alphas), log_alphas[::-1], np.arange(T)[::-1]), alphas)


def levels_to_first_timestep(spacing: str, S: int, alphas_cumprod: np.ndarray) -> NoiseLevels:
    """Levels of S steps that end at timestep 0, where the published DPM-Solver stops."""
    if spacing == "trailing":
        starts = noise_levels(spacing, S, alphas_cumprod)
        return NoiseLevels(starts.t, np.append(alphas_cumprod[0], starts.alphas))
    levels = noise_levels(spacing, S + 1, alphas_cumprod)
    return NoiseLevels(levels.t[1:], levels.alphas)
