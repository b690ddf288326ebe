"""Factors of DPM-Solver++'s steps, float64, indexed by the step they belong to (arXiv 2211.01095, appendix; 2206.00927 for order 3).

Step k leads from level k + 1 to level k; h is its length in lam, half the logarithm of the signal-to-noise ratio. Where h or a
length before it is infinite, which pure noise makes it, the solver's first order is exact and the weights of higher orders are 0 or unused.
"""

from __future__ import annotations

import numpy as np

from ldm.models.diffusion.samplers.spacing import Levels


def multistep_tables(levels: Levels) -> dict[str, np.ndarray]:
    """x_k = keep x + move m_0, plus second (m_0 - m_1), or plus third_new (m_0 - m_1) + third_old (m_1 - m_2); each (S,).

    Order 3 integrates the parabola through three predictions exactly; the solver's released code weighs its curvature by half,
    which leaves order 2.
    """
    alpha, h = levels.alpha[:-1], levels.lam[:-1] - levels.lam[1:]
    move = -alpha * np.expm1(-h)
    phi_2, phi_3 = phis(h)
    h_1, h_2 = np.append(h[1:], np.inf), np.append(h[2:], [np.inf, np.inf])[: len(h)]  # of the two steps before
    mixed, curved = ratio(h_1, h_1 + h_2), 2 * ratio(h, h_1 + h_2)
    return {
        "keep": levels.sigma[:-1] / levels.sigma[1:],
        "move": move,
        "second": 0.5 * move * ratio(h, h_1),
        "third_new": alpha * (phi_2 * (1 + mixed) - phi_3 * curved) * ratio(h, h_1),
        "third_old": alpha * (phi_3 * curved - phi_2 * mixed) * ratio(h, h_2),
    }


def singlestep_tables(levels: Levels, order: int) -> dict[str, np.ndarray]:
    """Stage of each step within its block, and x_k = keep_s x_s + move_s m_s + correct (m - m_s) from the block's start s; each (S,).

    `keep` and `move` are the factors of a first-order step from the level before.
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
            if stage == 0 or h == 0.0:
                continue
            r = (lam[k + 1] - lam[s]) / h  # where the newest prediction stands within the block
            if size == 2:
                tables["correct"][k] = 0.5 / r * tables["move_s"][k]
            else:
                tables["correct"][k] = alpha[k] * float(phis(np.array(to_k))[0]) * (to_k / h) / r
        s -= size
    h = lam[:-1] - lam[1:]
    return {**tables, "keep": sigma[:-1] / sigma[1:], "move": -alpha[:-1] * np.expm1(-h)}


def blocks(S: int, order: int, first_alone: bool = False) -> list[int]:
    """Sizes of the blocks, first to last, that share out S network calls: as published, the last ones are smaller."""
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
    usable = np.isfinite(b) & (b > 0)
    return np.where(usable, np.where(usable, a, 0.0) / np.where(usable, b, 1.0), 0.0)
