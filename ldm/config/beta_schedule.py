"""The beta schedules that configs can name."""

import math

import numpy as np

BETA_SCHEDULES = ("linear", "cosine", "sqrt_linear", "sqrt")


def make_beta_schedule(
    schedule: str, n_timestep: int, linear_start: float = 1e-4, linear_end: float = 2e-2, cosine_s: float = 8e-3
) -> np.ndarray:
    """Return the variances beta_1..beta_T of the forward process, (n_timestep,) float64.

    The published `linear` is linear in sqrt(beta); `sqrt_linear` is linear in beta, as in DDPM (arXiv 2006.11239,
    section 4); `cosine` is eq. 17 of arXiv 2102.09672. Raises ValueError for an unknown name.
    """
    if n_timestep < 1:
        raise ValueError(f"timesteps {n_timestep}: a noise schedule needs at least 1")
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=np.float64) ** 2
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64) ** 0.5
    if schedule == "cosine":
        t = np.arange(n_timestep + 1, dtype=np.float64) / n_timestep + cosine_s
        alpha_bar = np.cos(t / (1 + cosine_s) * math.pi / 2) ** 2
        return np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, 0.999)
    raise ValueError(f"beta_schedule {schedule!r}: choose one of {', '.join(BETA_SCHEDULES)}")
