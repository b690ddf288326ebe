"""The loss of a KL autoencoder: likelihood under a learned scale, KL to the standard normal, and the adversarial term."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.reconstruction import DISCRIMINATOR, GENERATOR, AdversarialLoss


class DummyLoss(nn.Module):
    """Stands where a first stage that only encodes and decodes names a loss; it cannot train."""


class LPIPSWithDiscriminator(AdversarialLoss):
    """nll + kl_weight * KL + d_weight * disc_factor * g_loss, sums over pixels and latent elements divided by the batch (LDM eq. 25).

    nll is (pixels + LPIPS) / exp(logvar) + logvar for every pixel; logvar is one number, fixed unless `learn_logvar` is true.
    The other options are those of AdversarialLoss.
    """

    def __init__(
        self,
        disc_start: int | None = None,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
        disc_ndf: int = 64,
        learn_logvar: bool = False,
        perceptual_init: str = "pretrained",
        perceptual_weights: str | os.PathLike | None = None,
        use_discriminator: bool = True,
    ) -> None:
        super().__init__(
            disc_start=disc_start,
            pixelloss_weight=pixelloss_weight,
            disc_num_layers=disc_num_layers,
            disc_in_channels=disc_in_channels,
            disc_ndf=disc_ndf,
            disc_factor=disc_factor,
            disc_weight=disc_weight,
            perceptual_weight=perceptual_weight,
            use_actnorm=use_actnorm,
            disc_conditional=disc_conditional,
            disc_loss=disc_loss,
            perceptual_init=perceptual_init,
            perceptual_weights=perceptual_weights,
            use_discriminator=use_discriminator,
        )
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.full((), float(logvar_init)), requires_grad=learn_logvar)

    @property
    def learn_logvar(self) -> bool:
        return self.logvar.requires_grad

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
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, named logs) of the generator (optimizer_idx 0) or the discriminator (1).

        inputs, reconstructions: (B, C, H, W) in [-1, 1]; weights: factors of the nll, broadcast to that shape;
        global_step: generator updates so far; last_layer: the weight of the decoder's last convolution.
        """
        inputs, reconstructions = inputs.float(), reconstructions.float()
        if optimizer_idx == DISCRIMINATOR:
            return self.discriminator_loss(inputs, reconstructions, cond, global_step, split)
        if optimizer_idx != GENERATOR:
            raise ValueError(f"optimizer_idx={optimizer_idx}: 0 is the generator, 1 the discriminator")
        batch = inputs.shape[0]
        rec_loss, _ = self.reconstruction_loss(inputs, reconstructions)  # (B, C, H, W)
        logvar = self.logvar.float()
        nll = rec_loss / logvar.exp() + logvar
        weighted_nll_loss = (nll if weights is None else weights * nll).sum() / batch
        nll_loss = nll.sum() / batch
        kl = posteriors.kl()  # (B,)
        kl_loss = kl.sum() / kl.shape[0]
        adversarial = self.generator_term(nll_loss, reconstructions, cond, global_step, last_layer)
        loss = weighted_nll_loss + self.kl_weight * kl_loss
        if adversarial.term is not None:
            loss = loss + adversarial.term
        log = {
            "total_loss": loss,
            "logvar": self.logvar,
            "kl_loss": kl_loss,
            "nll_loss": nll_loss,
            "rec_loss": rec_loss.mean(),
            "d_weight": adversarial.d_weight,
            "disc_factor": torch.tensor(adversarial.disc_factor),
            "g_loss": adversarial.g_loss,
        }
        return loss, {f"{split}/{name}": value.detach().clone() for name, value in log.items()}
