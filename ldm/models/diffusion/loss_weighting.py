"""Weighting of timesteps in the training loss of diffusion models.

A new weighting is one subclass of LossWeighting, named in a YAML: `loss_weighting_config: {target: ..., params: ...}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.instantiate import instantiate_from_config
from ldm.config.types import NonNegativeFloat
from ldm.models.diffusion.gaussian_diffusion import GaussianDiffusion
from ldm.models.training import Losses
from ldm.modules.diffusionmodules.schedule import extract_into_tensor


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
        weighted = errors / torch.exp(logvar) + logvar
        if self.learn_logvar:
            logs["loss_gamma"] = weighted.mean()
        logs["loss_vlb"] = (diffusion.lvlb_weights[t] * errors).mean()
        return self.l_simple_weight * weighted.mean() + self.original_elbo_weight * logs["loss_vlb"], logs


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
    return instantiate_from_config(config)
