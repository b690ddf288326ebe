"""Loss of a KL autoencoder: negative log-likelihood, KL divergence to the standard normal and adversarial term."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.types import NonNegativeFloat, NonNegativeInt
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.reconstruction import AdversarialLoss, Logs, is_discriminator_turn, named_logs


class DummyLoss(nn.Module):
    """Loss of a first stage that only encodes and decodes; it cannot train."""


class LPIPSWithDiscriminator(AdversarialLoss):
    """nll + kl_weight * KL + d_weight * disc_factor * g_loss; nll and KL are sums divided by the batch (LDM eq. 25).

    nll is (pixels + LPIPS) / exp(logvar) + logvar for every pixel; logvar is one number, fixed unless `learn_logvar`.
    The other options are those of AdversarialLoss.
    """

    summed = ("aeloss", "total_loss", "nll_loss", "kl_loss")  # over the values of an image, not averaged

    def __init__(
        self,
        disc_start: NonNegativeInt | None = None,
        logvar_init: float = 0.0,
        kl_weight: NonNegativeFloat = 1.0,
        learn_logvar: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(disc_start=disc_start, **options)
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.full((), float(logvar_init)), requires_grad=learn_logvar)

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posteriors: DiagonalGaussianDistribution,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Logs]:
        """(loss, named logs) of the generator (optimizer_idx 0) or the discriminator (1).

        inputs, reconstructions: (B, C, H, W) in [-1, 1]; weights: factors of the nll that broadcast to this shape;
        global_step: generator updates so far; last_layer: weight of the decoder's last convolution.
        """
        inputs, reconstructions = inputs.float(), reconstructions.float()
        if is_discriminator_turn(optimizer_idx):
            return self.discriminator_loss(inputs, reconstructions, cond, global_step, split)
        batch = inputs.shape[0]
        rec_loss, _ = self.reconstruction_loss(inputs, reconstructions)  # (B, C, H, W)
        logvar = self.logvar.float()
        nll = rec_loss / logvar.exp() + logvar
        nll_loss = nll.sum() / batch
        weighted_nll_loss = nll_loss if weights is None else (weights * nll).sum() / batch
        kl_loss = posteriors.kl().mean()
        loss, log = self.generator_loss(
            weighted_nll_loss + self.kl_weight * kl_loss, nll_loss, reconstructions, cond, global_step, last_layer
        )
        log |= {"logvar": self.logvar, "kl_loss": kl_loss, "nll_loss": nll_loss, "rec_loss": rec_loss.mean()}
        return loss, named_logs(split, log)
