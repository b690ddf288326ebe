"""The samplers of Karras et al. and of k-diffusion, in the chain's own scale: x = alpha * x_0 + sigma * eps.

They walk S noise levels down from the last timestep to timestep 0, and then to the clean latent. Their papers write them for
x / alpha and the noise level sigma / alpha; multiplied out no division by alpha is left, so that a run may start from pure noise.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ldm.models.diffusion.samplers.base import Sampler
from ldm.models.diffusion.samplers.denoiser import Grid, Run
from ldm.models.diffusion.samplers.spacing import CONTINUOUS_GRIDS, Levels, chain_alphas, noise_levels


class KSampler(Sampler):
    """A sampler whose last step leads to the clean latent; `ddim_discretize="karras"` spaces its levels as EDM does."""

    grids = CONTINUOUS_GRIDS

    def make_grid(self, S: int, eta: float, discretize: str) -> Grid:
        start = noise_levels(discretize, S, chain_alphas(self.model))
        end = Levels(start.t, np.append(1.0, start.alphas[:-1]))
        sigmas, coefs = self.tables(start, end, eta)
        return Grid(start.t, start.alphas, end.alphas, sigmas, coefs)

    @abstractmethod
    def tables(self, start: Levels, end: Levels, eta: float) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        """Noise scale of each step, and its other factors by name, each (S,)."""


class EulerSampler(KSampler):
    """Euler's method for the probability flow, https://arxiv.org/abs/2206.00364 (Algorithm 1 without its correction)."""

    def tables(self, start: Levels, end: Levels, eta: float) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        return np.zeros_like(start.alphas), {}

    def step(self, x: Tensor, k: int, run: Run) -> tuple[Tensor, Tensor]:
        eps, x0 = run.predict(x, k)
        return run.alpha_prev[k].sqrt() * x0 + (1 - run.alpha_prev[k]).sqrt() * eps, x0


class EulerAncestralSampler(KSampler):
    """Euler's method below the next level, and fresh noise up to it (k-diffusion's ancestral step; eta 0 is Euler)."""

    default_eta = 1.0
    takes_eta = True
    adds_noise = True

    def tables(self, start: Levels, end: Levels, eta: float) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        signal_share = (
            (start.alphas / end.alphas) * (1 - end.alphas) / (1 - start.alphas)
        )  # (sigma_end / sigma_start)^2 in EDM's scale
        up = np.minimum(end.sigma, eta * end.sigma * np.sqrt(1 - signal_share))
        return up, {"down": np.sqrt(np.maximum(end.sigma**2 - up**2, 0.0))}

    def step(self, x: Tensor, k: int, run: Run) -> tuple[Tensor, Tensor]:
        eps, x0 = run.predict(x, k)
        return run.alpha_prev[k].sqrt() * x0 + run.coefs["down"][k] * eps + run.sigma[k] * run.noise(x), x0


class HeunSampler(KSampler):
    """Heun's method for the probability flow, https://arxiv.org/abs/2206.00364 (Algorithm 1); two network calls a step but for the last."""

    def tables(self, start: Levels, end: Levels, eta: float) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        keep = end.alpha / np.where(start.alpha > 0, start.alpha, np.inf)
        return np.zeros_like(start.alphas), {"keep": keep, "move": end.sigma - keep * start.sigma}

    def step(self, x: Tensor, k: int, run: Run) -> tuple[Tensor, Tensor]:
        eps, x0 = run.predict(x, k)
        euler = run.alpha_prev[k].sqrt() * x0 + (1 - run.alpha_prev[k]).sqrt() * eps
        if k == 0 or run.starts_from_noise(k):  # no slope exists at the clean end, none of finite size at pure noise
            return euler, x0
        eps_next, _ = run.predict(euler, k - 1)
        return run.coefs["keep"][k] * x + run.coefs["move"][k] * (eps + eps_next) / 2, x0


class DPMPP2MSDESampler(KSampler):
    """DPM-Solver++ (2M) for the diffusion SDE, https://arxiv.org/abs/2211.01095, in k-diffusion's form; `eta` 0 is the ODE.

    solver: how the second-order term is weighed, `midpoint` as in the paper's 2M or `heun` for the exact weight.
    """

    default_eta = 1.0
    takes_eta = True
    adds_noise = True

    def __init__(self, model: Any, schedule: str = "linear", solver: str = "midpoint") -> None:
        super().__init__(model, schedule)
        if solver not in ("midpoint", "heun"):
            raise ValueError(f"solver {solver!r}: choose one of midpoint, heun")
        self.solver = solver

    def tables(self, start: Levels, end: Levels, eta: float) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        h = end.lam - start.lam  # infinite to the clean end, and from pure noise
        noise = eta * h if eta else np.zeros_like(h)
        move = -end.alpha * np.expm1(-h - noise)
        weight = move / 2 if self.solver == "midpoint" else end.alpha + (np.expm1(-h - noise) / (h + noise)) * end.alpha
        second = np.zeros_like(h)
        second[1:-1] = weight[1:-1] * h[1:-1] / h[2:]  # the first step has no history, the last one is of first order
        keep = end.sigma / start.sigma * np.exp(-noise)
        return end.sigma * np.sqrt(-np.expm1(-2 * noise)), {"keep": keep, "move": move, "second": second}

    def step(self, x: Tensor, k: int, run: Run) -> tuple[Tensor, Tensor]:
        _, x0 = run.predict(x, k)
        x_prev = run.coefs["keep"][k] * x + run.coefs["move"][k] * x0
        if run.history:
            x_prev = x_prev + run.coefs["second"][k] * (x0 - run.history[-1])
        run.history = [x0]
        return x_prev + run.sigma[k] * run.noise(x) if self.adds_noise else x_prev, x0


class DPMPP2MSampler(DPMPP2MSDESampler):
    """DPM-Solver++ (2M) down to the clean latent, https://arxiv.org/abs/2211.01095 (Algorithm 2), in k-diffusion's form."""

    default_eta = 0.0
    takes_eta = False
    adds_noise = False

    def __init__(self, model: Any, schedule: str = "linear") -> None:
        super().__init__(model, schedule, "midpoint")
