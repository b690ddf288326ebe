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
        for k in range(S):
            for order in range(1, min(self.order, S - k) + 1):
                nodes = lam[k + 2 : k + 1 + order] - lam[k + 1]  # of the predictions before the newest
                both = weights(lam[k] - lam[k + 1], nodes, self.variant)
                predict[k, order - 1, : order - 1], correct[k, order - 1, :order] = (-levels.alpha[k] * w for w in both)
        coefs = {**levels.first_order(), "predict": predict, "correct": correct}
        return Steps(levels.t, levels.alphas[1:], levels.alphas[:-1], np.zeros(S), coefs)

    def step(self, x: Tensor, k: int, run: SamplingRun) -> tuple[Tensor, Tensor]:
        _, x0 = run.predict(x, k)
        x_base, *old = run.history or [x]  # start of the last step, and the predictions from there back
        if old:  # UniC: the last step again, with the prediction at its end
            order = min(self.order, len(old), k + 2)
            x = self.move(x_base, k + 1, run, old, [*old[1:order], x0], run.coefs["correct"][k + 1, order - 1])
        recent = [x0, *old][: self.order]
        order = min(len(recent), k + 1)  # the last steps are of lower order, which is more stable
        run.history = [] if run.starts_from_noise(k) else [x, *recent]
        return self.move(x, k, run, recent, recent[1:order], run.coefs["predict"][k, order - 1]), x0  # UniP

    def move(
        self, x: Tensor, k: int, run: SamplingRun, predictions: list[Tensor], others: list[Tensor], weight: Tensor
    ) -> Tensor:
        """Take step k from x with the newest of `predictions` and the weighted differences of `others` from it."""
        x_prev = run.coefs["keep"][k] * x + run.coefs["move"][k] * predictions[0]
        for i, other in enumerate(others):
            x_prev = x_prev + weight[i] * (other - predictions[0])
        return x_prev


def weights(h: float, nodes: np.ndarray, variant: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the differences m_i - m_0 in the predictor (p - 1,) and in the corrector (p,), section 3.1.

    h: the step's length in lam; nodes: (p - 1,) lam of the older predictions relative to the newest. The corrector's
    last difference is at the step's end. The weights match phi_2 ... phi_{p+1} of the exact integral.
    """
    order = len(nodes) + 1
    if h == 0.0 or not np.isfinite(h) or not np.isfinite(nodes).all():  # from pure noise only first order exists
        return np.zeros(order - 1), np.zeros(order)
    B = -h if variant == "bh1" else np.expm1(-h)
    r = np.append(nodes / h, 1.0)
    phi, b, factorial = np.expm1(-h) / -h - 1, [], 1.0
    for n in range(1, order + 1):
        b.append(phi * factorial / B)
        factorial *= n + 1
        phi = phi / -h - 1 / factorial
    R = np.vander(r, order, increasing=True).T
    predict = np.array([0.5])[: order - 1] if order <= 2 else np.linalg.solve(R[:-1, :-1], b[:-1])
    correct = np.array([0.5]) if order == 1 else np.linalg.solve(R, b)
    return B * predict / r[:-1], B * correct / r
