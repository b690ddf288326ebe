"""The samplers of Karras et al. and of k-diffusion, for x = alpha * x_0 + sigma * eps.

They take S noise levels from the last timestep to timestep 0, and then the clean latent. The papers use x / alpha and
the noise level sigma / alpha; here nothing is divided by alpha, so a run may start from pure noise.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ldm.models.diffusion.samplers.base import ContinuousTimeSampler
from ldm.models.diffusion.samplers.denoiser import DiffusionModel, SamplingRun, Steps
from ldm.models.diffusion.samplers.spacing import NoiseLevels, model_alphas_cumprod, noise_levels


class KSampler(ContinuousTimeSampler):
    """A sampler whose last step leads to the clean latent; a subclass has its `step`, and tables if it needs any."""

    def make_steps(self, S: int, eta: float, spacing: str) -> Steps:
        start = noise_levels(spacing, S, model_alphas_cumprod(self.model))
        end = NoiseLevels(start.t, np.append(1.0, start.alphas[:-1]))
        sigmas, coefs = self.tables(start, end, eta)
        return Steps(start.t, start.alphas, end.alphas, sigmas, coefs)

    def tables(self, start: NoiseLevels, end: NoiseLevels, eta: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Noise scale of each step, and its other coefficients by name, each (S,)."""
        return np.zeros_like(start.alphas), {}


class EulerSampler(KSampler):
    """Euler's method for the probability flow ODE, https://arxiv.org/abs/2206.00364 (Algorithm 1, first order)."""

    def step(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        eps, x0 = run.predict(x, k)
        return run.signal_prev[k] * x0 + run.noise_level_prev[k] * eps, x0


class EulerAncestralSampler(KSampler):
    """An Euler step below the next level, then new noise up to it (k-diffusion's ancestral step; eta 0 is Euler)."""

    default_eta = 1.0
    takes_eta = True
    adds_noise = True

    def tables(self, start: NoiseLevels, end: NoiseLevels, eta: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        ratio = start.alphas / end.alphas * (1 - end.alphas) / (1 - start.alphas)  # (sigma_end / sigma_start)^2 of EDM
        up = np.minimum(end.sigma, eta * end.sigma * np.sqrt(1 - ratio))
        return up, {"down": np.sqrt(np.maximum(end.sigma**2 - up**2, 0.0))}

    def step(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        eps, x0 = run.predict(x, k)
        return run.signal_prev[k] * x0 + run.coefs["down"][k] * eps + run.sigma[k] * run.noise(x), x0


class HeunSampler(KSampler):
    """Heun's method for the probability flow ODE, https://arxiv.org/abs/2206.00364 (Algorithm 1)."""

    def tables(self, start: NoiseLevels, end: NoiseLevels, eta: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        keep = end.alpha / np.where(start.alpha > 0, start.alpha, np.inf)
        return np.zeros_like(start.alphas), {"keep": keep, "move": end.sigma - keep * start.sigma}

    def step(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        eps, x0 = run.predict(x, k)
        euler = run.signal_prev[k] * x0 + run.noise_level_prev[k] * eps
        if k == 0 or run.starts_from_noise(k):  # the clean end has no slope, and pure noise no finite one
            return euler, x0
        eps_next, _ = run.predict(euler, k - 1)
        return run.coefs["keep"][k] * x + run.coefs["move"][k] * (eps + eps_next) / 2, x0


class DPMPP2MSDESampler(KSampler):
    """DPM-Solver++ (2M) for the diffusion SDE, https://arxiv.org/abs/2211.01095, as in k-diffusion; eta 0 is the ODE.

    solver: weight of the second-order term, `midpoint` as in the paper's 2M, or `heun` for the exact one.
    """

    default_eta = 1.0
    takes_eta = True
    adds_noise = True

    def __init__(self, model: DiffusionModel, schedule: str = "linear", solver: str = "midpoint") -> None:
        super().__init__(model, schedule)
        if solver not in ("midpoint", "heun"):
            raise ValueError(f"solver {solver!r}: choose one of midpoint, heun")
        self.solver = solver

    def tables(self, start: NoiseLevels, end: NoiseLevels, eta: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        h = end.lam - start.lam  # infinite to the clean end, and from pure noise
        noise = eta * h if eta else np.zeros_like(h)
        move = -end.alpha * np.expm1(-h - noise)
        weight = move / 2 if self.solver == "midpoint" else end.alpha + (np.expm1(-h - noise) / (h + noise)) * end.alpha
        second = np.zeros_like(h)
        second[1:-1] = weight[1:-1] * h[1:-1] / h[2:]  # the first step has no history, the last one is of first order
        keep = end.sigma / start.sigma * np.exp(-noise)
        return end.sigma * np.sqrt(-np.expm1(-2 * noise)), {"keep": keep, "move": move, "second": second}

    def step(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        _, x0 = run.predict(x, k)
        x_prev = run.coefs["keep"][k] * x + run.coefs["move"][k] * x0
        if run.history:
            x_prev = x_prev + run.coefs["second"][k] * (x0 - run.history[-1])
        run.history = [x0]
        return x_prev + run.sigma[k] * run.noise(x) if self.adds_noise else x_prev, x0


class DPMPP2MSampler(DPMPP2MSDESampler):
    """DPM-Solver++ (2M), https://arxiv.org/abs/2211.01095 (Algorithm 2), down to the clean latent as in k-diffusion."""

    default_eta = 0.0
    takes_eta = False
    adds_noise = False

    def __init__(self, model: DiffusionModel, schedule: str = "linear") -> None:
        super().__init__(model, schedule, "midpoint")
