"""Diagonal Gaussian of a KL autoencoder's latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.published import published_names
from ldm.rng import Purpose, current_samples


class DiagonalGaussianDistribution:
    """N(mean, diag(exp(logvar))) over latents, from the encoder's moments.

    parameters: (B, 2C, h, w), the mean in the first C channels, then the log variance, which is clamped to [-30, 20].
    `deterministic` sets the variance to 0: `sample` returns the mean, `kl` and `nll` return 0.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        if parameters.shape[1] % 2:
            raise ValueError(f"parameters: expected (B, 2C, ...), got {tuple(parameters.shape)}; set double_z: true")
        self.parameters = parameters
        self.mean, logvar = torch.chunk(parameters, 2, dim=1)  # (B, C, h, w) each
        self.logvar = logvar.clamp(-30.0, 20.0)  # keeps the variance finite in float32
        self.deterministic = deterministic
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(self.mean) if deterministic else torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise, (B, C, h, w).

        The noise is that of the current samples if there are any (see ldm.rng). Else it is sampled on the CPU, as
        published, so that a seed gives the same latent on every device.
        """
        samples = current_samples() if generator is None else None
        if samples is not None:
            noise = samples.normal(self.mean.shape, Purpose.POSTERIOR, self.mean.device)
        else:
            noise = torch.randn(self.mean.shape, generator=generator, device="cpu")
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Tensor:
        """The mean, (B, C, h, w)."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL(self || other) in nats, summed over all latent elements: (B,). `other` is N(0, 1) by default."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        mean, var, logvar = _at_least_float32(self.mean, self.var, self.logvar)
        if other is None:
            terms = mean.square() + var - 1.0 - logvar
        else:
            other_mean, other_var, other_logvar = _at_least_float32(other.mean, other.var, other.logvar)
            terms = (mean - other_mean).square() / other_var + var / other_var - 1.0 - logvar + other_logvar
        return 0.5 * terms.sum(dim=list(range(1, terms.ndim)))

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """-log p(sample) in nats, summed over `dims`; sample: (B, C, h, w) -> (B,) with the default dims."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        mean, var, logvar, sample = _at_least_float32(self.mean, self.var, self.logvar, sample)
        return 0.5 * (math.log(2.0 * math.pi) + logvar + (sample - mean).square() / var).sum(dim=list(dims))


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)) in nats, element by element; one argument must be a tensor."""
    tensor = next((x for x in (mean1, logvar1, mean2, logvar2) if isinstance(x, Tensor)), None)
    if tensor is None:
        raise TypeError("normal_kl: at least one of the four arguments must be a tensor")
    logvar1, logvar2 = (x if isinstance(x, Tensor) else tensor.new_tensor(x) for x in (logvar1, logvar2))
    return 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def _at_least_float32(*tensors: Tensor) -> list[Tensor]:
    """The tensors, those of 16 bits in float32: sums over thousands of latent elements need the precision."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


__getattr__ = published_names(__name__)
