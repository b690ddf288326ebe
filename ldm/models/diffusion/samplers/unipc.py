"""UniPC: a predictor and a corrector of one form, at one network call a step."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ldm.models.diffusion.samplers.base import ContinuousTimeSampler
from ldm.models.diffusion.samplers.denoiser import DiffusionModel, SamplingRun, Steps
from ldm.models.diffusion.samplers.spacing import levels_to_first_timestep, model_alphas_cumprod

MAX_ORDER = 3


class UniPCSampler(ContinuousTimeSampler):
    """Unified predictor-corrector, https://arxiv.org/abs/2302.04867 (Algorithms 1 and 2, multistep, data prediction).

    order: the predictor's, 1 to 3; the corrector's is one higher. variant: B(h) of the paper, `bh1` is h, `bh2` expm1.
    """

    def __init__(self, model: DiffusionModel, schedule: str = "linear", order: int = 2, variant: str = "bh2") -> None:
        super().__init__(model, schedule)
        if order not in range(1, MAX_ORDER + 1):
            raise ValueError(f"order {order}: choose 1 to {MAX_ORDER}; 2 is usual with guidance, 3 without")
        if variant not in ("bh1", "bh2"):
            raise ValueError(f"variant {variant!r}: choose one of bh1, bh2")
        self.order, self.variant = order, variant

    def make_steps(self, S: int, eta: float, spacing: str) -> Steps:
        levels = levels_to_first_timestep(spacing, S, model_alphas_cumprod(self.model))
        lam = levels.lam
        predict, correct = np.zeros((S, MAX_ORDER, MAX_ORDER)), np.zeros((S, MAX_ORDER, MAX_ORDER))
        for order in range(1, min(self.order, S) + 1):
            k = np.arange(S + 1 - order)
            before = k[:, None] + np.arange(2, order + 1)  # predictions before the newest
            nodes = lam[before] - lam[k + 1][:, None]
            both = weights(lam[k] - lam[k + 1], nodes, self.variant)
            for table, w in zip((predict, correct), both):
                table[k, order - 1, : w.shape[1]] = -levels.alpha[k][:, None] * w
        coefs = {**levels.first_order(), "predict": predict, "correct": correct}
        return Steps(levels.t, levels.alphas[1:], levels.alphas[:-1], np.zeros(S), coefs)

    def step(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        _, x0 = run.predict(x, k)
        x_base, *old = run.history or [x]  # start of the last step, and the predictions from there back
        if old:  # UniC: the last step again, with the prediction at its end
            order = min(self.order, len(old), k + 2)
            x = self.move(x_base, k + 1, run, old, [*old[1:order], x0], run.coefs["correct"][k + 1][order - 1])
        recent = [x0, *old][: self.order]
        order = min(len(recent), k + 1)  # the last steps are of lower order, which is more stable
        run.history = [] if run.starts_from_noise(k) else [x, *recent]
        return self.move(x, k, run, recent, recent[1:order], run.coefs["predict"][k][order - 1]), x0  # UniP

    def move(
        self, x: Tensor, k: int, run: SamplingRun, predictions: list[Tensor], others: list[Tensor], weight: list[float]
    ) -> Tensor:
        """Take step k from x with the newest of `predictions` and the weighted differences of `others` from it."""
        x_prev = run.coefs["keep"][k] * x + run.coefs["move"][k] * predictions[0]
        for i, other in enumerate(others):
            x_prev = x_prev + weight[i] * (other - predictions[0])
        return x_prev


def weights(h: np.ndarray, nodes: np.ndarray, variant: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the differences m_i - m_0 in the predictor (S, p - 1) and in the corrector (S, p), section 3.1.

    h: (S,) lengths of the steps in lam; nodes: (S, p - 1) lam of the older predictions relative to the newest. The
    corrector's last difference is at the step's end. The weights match phi_2 ... phi_{p+1} of the exact integral; they
    are 0 where only first order exists, as from pure noise.
    """
    order = nodes.shape[1] + 1
    exists = (h != 0.0) & np.isfinite(h) & np.isfinite(nodes).all(axis=1)
    h, nodes = np.where(exists, h, 1.0), np.where(exists[:, None], nodes, -np.arange(1.0, order))
    B = (-h if variant == "bh1" else np.expm1(-h))[:, None]
    r = np.append(nodes / h[:, None], np.ones((len(h), 1)), axis=1)  # (S, p)
    phi, b, factorial = np.expm1(-h) / -h - 1, [], 1.0
    for n in range(1, order + 1):
        b.append(phi * factorial / B[:, 0])
        factorial *= n + 1
        phi = phi / -h - 1 / factorial
    right = np.stack(b, axis=1)[:, :, None]  # (S, p, 1)
    R = np.cumprod(np.stack([np.ones_like(r), *[r] * (order - 1)], axis=1), axis=1)  # (S, p, p), powers of r from 0 up
    half = np.full_like(h, 0.5)[:, None]
    predict = half[:, : order - 1] if order <= 2 else np.linalg.solve(R[:, :-1, :-1], right[:, :-1])[:, :, 0]
    correct = half if order == 1 else np.linalg.solve(R, right)[:, :, 0]
    return np.where(exists[:, None], B * predict / r[:, :-1], 0.0), np.where(exists[:, None], B * correct / r, 0.0)
