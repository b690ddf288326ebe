"""Parameterizations of the network output, eps, x0 or v, as conversions to and from noise and clean signal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Scale = Tensor | float


@dataclass(frozen=True)
class Parameterization:
    """A training target and its inverse, for x = alpha * x0 + sigma * eps with alpha^2 + sigma^2 = 1.

    alpha and sigma are numbers, or broadcast against x (B, C, H, W); `out` is the network's output at x.
    """

    target: Callable[[Tensor, Tensor, Scale, Scale], Tensor]  # (x0, eps, alpha, sigma) -> training target
    to_x0: Callable[[Tensor, Tensor, Scale, Scale], Tensor]  # (x, out, alpha, sigma) -> clean signal
    to_eps: Callable[[Tensor, Tensor, Scale, Scale], Tensor]  # (x, out, alpha, sigma) -> noise


PARAMETERIZATIONS = {
    "eps": Parameterization(  # DDPM, arXiv 2006.11239, eq. 14
        target=lambda x0, eps, alpha, sigma: eps,
        to_x0=lambda x, out, alpha, sigma: (x - sigma * out) / alpha,
        to_eps=lambda x, out, alpha, sigma: out,
    ),
    "x0": Parameterization(
        target=lambda x0, eps, alpha, sigma: x0,
        to_x0=lambda x, out, alpha, sigma: out,
        to_eps=lambda x, out, alpha, sigma: (x - alpha * out) / sigma,
    ),
    "v": Parameterization(  # Salimans & Ho 2022, arXiv 2202.00512, section 4
        target=lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
        to_x0=lambda x, out, alpha, sigma: alpha * x - sigma * out,
        to_eps=lambda x, out, alpha, sigma: alpha * out + sigma * x,
    ),
}


def get_parameterization(name: str) -> Parameterization:
    """Return a parameterization by name; ValueError for an unknown one."""
    if name not in PARAMETERIZATIONS:
        raise ValueError(f"parameterization {name!r}: choose one of {', '.join(PARAMETERIZATIONS)}")
    return PARAMETERIZATIONS[name]
