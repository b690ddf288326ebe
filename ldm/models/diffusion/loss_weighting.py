"""Weighting of timesteps in the training loss of diffusion models.

The errors are those of the network's output. For squared errors, eps = SNR * x0 and v = (SNR + 1) * x0, so a weighting
of the error of x0 is divided by SNR for eps and by SNR + 1 for v.
A new weighting is one subclass of LossWeighting, named in a YAML: `loss_weighting_config: {target: ..., params: ...}`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.instantiate import build_section
from ldm.config.types import NonNegativeFloat, PositiveFloat, PositiveInt
from ldm.models.diffusion.gaussian_diffusion import GaussianDiffusion
from ldm.models.training import Losses
from ldm.modules.diffusionmodules.schedule import extract_into_tensor
from ldm.modules.dtype import Float32Tables, in_dtype


class LossWeighting(nn.Module):
    """Turns the errors of a batch into its loss. Parameters of a subclass are trained with the model."""

    def forward(self, errors: Tensor, t: Tensor, diffusion: GaussianDiffusion) -> Losses:
        """Return the loss and its logs, for mean errors (B,) of the network at t (B,).

        `diffusion` has the tables: `log_snr(t)` (B,), `parameterization`, `lvlb_weights` (T,) and `logvar` (T,).
        """
        raise NotImplementedError


class SimpleLossWeighting(LossWeighting):
    """The published loss: l_simple_weight * L_simple + original_elbo_weight * L_vlb (DDPM eq. 12 and 14, LDM eq. 2).

    In L_simple an error l at timestep t counts as l / exp(logvar_t) + logvar_t. `learn_logvar` logs it too.
    """

    def __init__(
        self,
        l_simple_weight: NonNegativeFloat = 1.0,
        original_elbo_weight: NonNegativeFloat = 0.0,
        learn_logvar: bool = False,
    ) -> None:
        super().__init__()
        self.l_simple_weight, self.original_elbo_weight = l_simple_weight, original_elbo_weight
        self.learn_logvar = learn_logvar

    def forward(self, errors: Tensor, t: Tensor, diffusion: GaussianDiffusion) -> Losses:
        logs = {"loss_simple": errors.mean()}
        logvar = extract_into_tensor(diffusion.logvar, t, errors.shape)
        logvar = _of_counted(errors, logvar) if self.learn_logvar else logvar
        weighted = errors / torch.exp(logvar) + logvar
        if self.learn_logvar:
            logs["loss_gamma"] = weighted.mean()
        logs["loss_vlb"] = (diffusion.lvlb_weights[t] * errors).mean()
        return self.l_simple_weight * weighted.mean() + self.original_elbo_weight * logs["loss_vlb"], logs


class SNRWeighting(LossWeighting):
    """Base of weightings that are functions of the signal-to-noise ratio; the loss is mean(weight * error)."""

    def x0_weights(self, snr: Tensor, t: Tensor, diffusion: GaussianDiffusion) -> Tensor:
        """Return the weights (B,) of the squared error of x0, for snr (B,) > 0 at t (B,)."""
        raise NotImplementedError

    def forward(self, errors: Tensor, t: Tensor, diffusion: GaussianDiffusion) -> Losses:
        snr = _snr(t, diffusion)
        per_x0 = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1.0}[diffusion.parameterization]
        weights = self.x0_weights(snr, t, diffusion) / per_x0
        return (weights * errors).mean(), {"loss_simple": errors.mean(), "weight": weights.mean()}


class ELBOWeighting(SNRWeighting):
    """Negative evidence lower bound of T steps in nats per dimension, up to constants (VDM, arXiv 2107.00630).

    The weight of x0 is T / 2 * (SNR(t - 1) - SNR(t)), which is DDPM's KL divergence with the posterior's variance; at
    t = 0 it is T / (2 beta_0), of a Gaussian decoder with variance beta_0. It is the bound for uniform timesteps.
    """

    def x0_weights(self, snr: Tensor, t: Tensor, diffusion: GaussianDiffusion) -> Tensor:
        # Differences of the SNR's float32 values would lose most digits; the posterior's tables were made in float64.
        kl = diffusion.posterior_mean_coef1[t].square() / diffusion.posterior_variance[t].clamp(min=1e-30)
        weights = diffusion.num_timesteps / 2.0 * torch.where(t == 0, 1.0 / diffusion.betas[0], kl)
        unbounded = (diffusion.alphas_cumprod[t] == 0) & (diffusion.parameterization == "eps")
        return torch.where(unbounded, 0.0, weights)


class MinSNRWeighting(SNRWeighting):
    """Min-SNR-gamma (arXiv 2303.09556): min(SNR, gamma) for x0."""

    def __init__(self, gamma: PositiveFloat = 5.0) -> None:
        super().__init__()
        self.gamma = gamma

    def x0_weights(self, snr: Tensor, t: Tensor, diffusion: GaussianDiffusion) -> Tensor:
        return snr.clamp(max=self.gamma)


class SoftMinSNRWeighting(SNRWeighting):
    """Soft-min-SNR (HDiT, arXiv 2401.11605): SNR * gamma / (SNR + gamma) for x0.

    gamma: the paper's 4 is for images of standard deviation 0.5; for data of standard deviation 1 that is 1.
    """

    def __init__(self, gamma: PositiveFloat = 1.0) -> None:
        super().__init__()
        self.gamma = gamma

    def x0_weights(self, snr: Tensor, t: Tensor, diffusion: GaussianDiffusion) -> Tensor:
        return snr * self.gamma / (snr + self.gamma)


class P2Weighting(SNRWeighting):
    """Perception-prioritized weighting (arXiv 2204.00227): 1 / (k + SNR)^gamma for eps."""

    def __init__(self, gamma: NonNegativeFloat = 1.0, k: PositiveFloat = 1.0) -> None:
        super().__init__()
        self.gamma, self.k = gamma, k

    def x0_weights(self, snr: Tensor, t: Tensor, diffusion: GaussianDiffusion) -> Tensor:
        return snr * (self.k + snr) ** -self.gamma


class LearnedLogVariance(Float32Tables, LossWeighting):
    """Loss exp(-u) * error + u with a log-variance u(SNR) trained with the model (EDM2, arXiv 2312.02696).

    At its optimum u is the logarithm of the mean error, so every noise level weighs the same, whatever the
    parameterization. u is linear in Fourier features of log(sigma / alpha) / 4 and 0 at first.
    channels: number of features.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: PositiveInt = 128) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)  # whatever the seed of the run
        self.register_buffer("frequencies", torch.randn(channels, generator=generator, device="cpu") * 2.0 * math.pi)
        self.register_buffer("phases", torch.rand(channels, generator=generator, device="cpu") * 2.0 * math.pi)
        self.linear = nn.Linear(channels, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def log_variance(self, t: Tensor, diffusion: GaussianDiffusion) -> Tensor:
        """Return u at t (B,), (B,)."""
        c_noise = -_snr(t, diffusion).clamp(min=1e-9).log() / 8.0  # log(sigma / alpha) / 4
        features = math.sqrt(2.0) * torch.cos(c_noise[:, None] * self.frequencies + self.phases)  # (B, channels)
        return in_dtype(self.linear.weight.dtype, self.linear, features)[:, 0]

    def forward(self, errors: Tensor, t: Tensor, diffusion: GaussianDiffusion) -> Losses:
        u = self.log_variance(t, diffusion).float()
        logs = {"loss_simple": errors.mean(), "logvar": u.mean()}
        u = _of_counted(errors, u)
        return (errors * (-u).exp() + u).mean(), logs


def _of_counted(errors: Tensor, log_variance: Tensor) -> Tensor:
    """Return log-variances (B,), 0 for samples that do not count: an empty mask or the weight 0 gives the error 0."""
    return torch.where(errors == 0, 0.0, log_variance)


def _snr(t: Tensor, diffusion: GaussianDiffusion) -> Tensor:
    """SNR at t (B,), (B,), within the range of float32's alphas_cumprod: positive and finite."""
    acp = diffusion.alphas_cumprod[t]
    return (acp / (1.0 - acp).clamp(min=2.0**-24)).clamp(min=1e-20)


def make_loss_weighting(config: Mapping[str, Any] | None, **published: Any) -> LossWeighting:
    """Return the weighting of `loss_weighting_config`, or without one the published loss with its arguments.

    Raises ValueError if both are given.
    """
    if config is None:
        return SimpleLossWeighting(**published)
    defaults = {name: p.default for name, p in signature(SimpleLossWeighting).parameters.items()}
    for name, value in published.items():
        if value != defaults[name]:
            raise ValueError(f"{name} {value}: it belongs to the published loss; remove it or loss_weighting_config")
    return build_section("loss_weighting_config", config, LossWeighting)
