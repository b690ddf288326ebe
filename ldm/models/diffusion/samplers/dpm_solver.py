"""DPM-Solver++ of orders 1 to 3, multistep and singlestep.

Step k leads from noise level k + 1 to level k; h is its length in lam, half the log-SNR. From pure noise h is infinite:
there the first order is exact, and the weights of the higher orders are 0 or unused.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ldm.models.diffusion.samplers.base import ContinuousTimeSampler
from ldm.models.diffusion.samplers.denoiser import DiffusionModel, SamplingRun, Steps
from ldm.models.diffusion.samplers.spacing import NoiseLevels, levels_to_first_timestep, model_alphas_cumprod

LOWER_ORDER_FINAL_BELOW = 15  # shorter multistep runs end with steps of lower order, which is more stable


class DPMSolverSampler(ContinuousTimeSampler):
    """DPM-Solver++, https://arxiv.org/abs/2211.01095 (Algorithm 2 is order 2 multistep, Algorithm 1 singlestep).

    A step is one network call: the S steps of a singlestep run form blocks of `order` steps, the last ones shorter.
    """

    order = 2
    method = "multistep"

    def __init__(
        self, model: DiffusionModel, schedule: str = "linear", order: int | None = None, method: str | None = None
    ) -> None:
        super().__init__(model, schedule)
        self.order = self.order if order is None else order
        self.method = self.method if method is None else method
        if self.order not in (1, 2, 3):
            raise ValueError(f"order {order}: choose one of 1, 2, 3; 2 is usual with guidance, 3 without")
        if self.method not in ("multistep", "singlestep"):
            raise ValueError(f"method {method!r}: choose one of multistep, singlestep")

    def make_steps(self, S: int, eta: float, spacing: str) -> Steps:
        levels = levels_to_first_timestep(spacing, S, model_alphas_cumprod(self.model))
        tables = multistep_tables(levels) if self.method == "multistep" else singlestep_tables(levels, self.order)
        return Steps(levels.t, levels.alphas[1:], levels.alphas[:-1], np.zeros(S), tables)

    def step(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        return self.multistep(x, k, run) if self.method == "multistep" else self.singlestep(x, k, run)

    def multistep(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        """Order 1 to 3 with the predictions of the steps before, newest first in the history."""
        _, x0 = run.predict(x, k)
        coefs, recent = run.coefs, [x0, *run.history]
        order = min(self.order, len(recent), k + 1 if len(run.t) < LOWER_ORDER_FINAL_BELOW else self.order)
        x_prev = coefs["keep"][k] * x + coefs["move"][k] * x0
        if order == 2:
            x_prev = x_prev + coefs["second"][k] * (x0 - recent[1])
        elif order == 3:
            x_prev = x_prev + coefs["third_new"][k] * (x0 - recent[1]) + coefs["third_old"][k] * (recent[1] - recent[2])
        run.history = [] if run.starts_from_noise(k) else recent[: self.order - 1]
        return x_prev, x0

    def singlestep(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        """One stage of a block: from the block's start x_s to the next level, with the predictions at x_s and at x."""
        _, x0 = run.predict(x, k)
        coefs, stage = run.coefs, int(run.steps.coefs["stage"][k])
        if stage > 0 and not run.history:  # image to image started within a block: order 1
            return coefs["keep"][k] * x + coefs["move"][k] * x0, x0
        if stage == 0:
            run.history = [x, x0]
        x_s, x0_s = run.history
        return coefs["keep_s"][k] * x_s + coefs["move_s"][k] * x0_s + coefs["correct"][k] * (x0 - x0_s), x0


class DPMSolver3MSampler(DPMSolverSampler):
    """DPM-Solver++ (3M)."""

    order = 3


class DPMSolver2SSampler(DPMSolverSampler):
    """DPM-Solver++ (2S)."""

    method = "singlestep"


class DPMSolver3SSampler(DPMSolverSampler):
    """DPM-Solver++ (3S)."""

    order = 3
    method = "singlestep"


def multistep_tables(levels: NoiseLevels) -> dict[str, np.ndarray]:
    """Coefficients of x_k, each (S,), from x_{k+1} and the predictions m_0, m_1, m_2, newest first.

    Order 1 is keep x + move m_0; order 2 adds second (m_0 - m_1), and order 3 adds third_new (m_0 - m_1) and
    third_old (m_1 - m_2). Order 3 integrates the parabola through the predictions exactly (arXiv 2211.01095,
    appendix); the authors' code halves its curvature, which leaves order 2.
    """
    alpha, h, first = levels.alpha[:-1], levels.lam[:-1] - levels.lam[1:], levels.first_order()
    phi_2, phi_3 = phis(h)
    h_1, h_2 = np.append(h[1:], np.inf), np.append(h[2:], [np.inf, np.inf])[: len(h)]  # of the two steps before
    mixed, curved = ratio(h_1, h_1 + h_2), 2 * ratio(h, h_1 + h_2)
    return {
        **first,
        "second": 0.5 * first["move"] * ratio(h, h_1),
        "third_new": alpha * (phi_2 * (1 + mixed) - phi_3 * curved) * ratio(h, h_1),
        "third_old": alpha * (phi_3 * curved - phi_2 * mixed) * ratio(h, h_2),
    }


def singlestep_tables(levels: NoiseLevels, order: int) -> dict[str, np.ndarray]:
    """Coefficients of x_k, each (S,), from the block's start s: keep_s x_s + move_s m_s + correct (m - m_s).

    `stage` is the step's index in its block, `keep` and `move` are those of a first-order step. Blocks of 3 are
    Algorithm 2 of arXiv 2206.00927 for data prediction.
    """
    alpha, sigma, lam, S = levels.alpha, levels.sigma, levels.lam, len(levels.t)
    tables = {name: np.zeros(S) for name in ("stage", "keep_s", "move_s", "correct")}
    s = S  # level at which the block starts
    for size in blocks(S, order, first_alone=levels.alphas[-1] == 0.0):
        h = lam[s - size] - lam[s]
        for stage in range(size):
            k = s - 1 - stage
            to_k = lam[k] - lam[s]
            tables["stage"][k] = stage
            tables["keep_s"][k] = sigma[k] / sigma[s]
            tables["move_s"][k] = -alpha[k] * np.expm1(-to_k)
            if stage == 0:
                continue
            r = (lam[k + 1] - lam[s]) / h  # position of the newest prediction within the block
            if size == 2:
                tables["correct"][k] = 0.5 / r * tables["move_s"][k]
            else:
                tables["correct"][k] = alpha[k] * float(phis(np.array(to_k))[0]) * (to_k / h) / r
        s -= size
    return {**tables, **levels.first_order()}


def blocks(S: int, order: int, first_alone: bool = False) -> list[int]:
    """Sizes of the blocks of S network calls, first to last; as published, the last ones are smaller."""
    if first_alone:
        return [1, *(blocks(S - 1, order) if S > 1 else [])]
    whole, rest = divmod(S, order)
    if order == 3 and rest == 0:
        return [*[3] * (whole - 1), 2, 1]
    return [*[order] * whole, *([rest] if rest else [])]


def phis(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """phi_2 = 1 - (1 - e^-h) / h and phi_3 = phi_2 / h - 1/2, elementwise; both 0 at h = 0."""
    safe = np.where(h == 0.0, 1.0, h)
    phi_2 = np.where(h == 0.0, 0.0, np.expm1(-safe) / safe + 1)
    return phi_2, np.where(h == 0.0, 0.0, phi_2 / safe - 0.5)


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is infinite or 0."""
    return np.divide(a, b, out=np.zeros_like(b), where=np.isfinite(b) & (b > 0))
