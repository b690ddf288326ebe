"""What the network predicts: eps, x0 or v, each as conversions between its output, the noise and the clean signal.

With x = alpha * x0 + sigma * eps and alpha^2 + sigma^2 = 1; alpha and sigma broadcast against x (B, C, H, W).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Parameterization(ABC):
    """A choice of training target and its inverse."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network is trained to output."""

    @abstractmethod
    def to_x0(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The clean signal that output `out` at noisy input `x` stands for."""

    @abstractmethod
    def to_eps(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The noise that output `out` at noisy input `x` stands for."""


class Eps(Parameterization):
    """The network predicts the noise (DDPM, arXiv 2006.11239, eq. 14)."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def to_x0(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x - sigma * out) / alpha

    def to_eps(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return out


class X0(Parameterization):
    """The network predicts the clean signal."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0

    def to_x0(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return out

    def to_eps(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x - alpha * out) / sigma


class V(Parameterization):
    """The network predicts v = alpha * eps - sigma * x0 (Salimans & Ho 2022, arXiv 2202.00512, section 4)."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * noise - sigma * x0

    def to_x0(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * x - sigma * out

    def to_eps(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * out + sigma * x


PARAMETERIZATIONS: dict[str, Parameterization] = {"eps": Eps(), "x0": X0(), "v": V()}


def get_parameterization(name: str) -> Parameterization:
    """The parameterization of that name; ValueError lists the choices."""
    if name not in PARAMETERIZATIONS:
        raise ValueError(f"parameterization {name!r}: choose one of {', '.join(PARAMETERIZATIONS)}")
    return PARAMETERIZATIONS[name]
