"""The loss of a VQ autoencoder: pixels and LPIPS, the codebook's loss, and the adversarial term (VQGAN, arXiv 2012.09841, eqs. 4-7).

Configs may name it by its published target too, `taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator`.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.modules.losses.contperceptual import DummyLoss
from ldm.modules.losses.reconstruction import DISCRIMINATOR, GENERATOR, AdversarialLoss

__all__ = ["CodebookUse", "DummyLoss", "VQLPIPSWithDiscriminator", "codebook_use", "measure_perplexity"]


def l1(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|, element by element."""
    return (x - y).abs()


def l2(x: Tensor, y: Tensor) -> Tensor:
    """(x - y)^2, element by element."""
    return (x - y).square()


PIXEL_LOSSES = {"l1": l1, "l2": l2}
PERCEPTUAL_LOSSES = ("lpips",)  # the published code also lists clips and dists, which were never there


class CodebookUse(NamedTuple):
    """How evenly, and how much of, a codebook is used."""

    perplexity: Tensor  # exp of the entropy of the codes' frequencies, in nats: n_embed where all are used alike, 1 where only one is
    cluster_usage: Tensor  # how many codes occur at all


def codebook_use(counts: Tensor) -> CodebookUse:
    """Perplexity and number of used codes from how often each code occurred: counts (n_embed,) -> two float32 scalars."""
    frequencies = counts.float() / counts.sum().clamp(min=1)
    return CodebookUse(torch.special.entr(frequencies).sum().exp(), (counts > 0).sum().float())


def measure_perplexity(predicted_indices: Tensor, n_embed: int) -> CodebookUse:
    """Use of a codebook of `n_embed` entries by a batch of codes (any shape, int64)."""
    return codebook_use(torch.bincount(predicted_indices.flatten(), minlength=n_embed))


class VQLPIPSWithDiscriminator(AdversarialLoss):
    """nll + codebook_weight * codebook loss + d_weight * disc_factor * g_loss; averages, where the KL autoencoder's loss takes sums.

    nll is the mean of pixelloss_weight * pixels + perceptual_weight * LPIPS; pixel_loss: 'l1' or 'l2'; perceptual_loss: 'lpips'.
    n_classes: size of the codebook, for its usage in the log; None takes the model's.
    The other options are those of AdversarialLoss.
    """

    def __init__(
        self,
        disc_start: int | None = None,
        codebook_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
        n_classes: int | None = None,
        perceptual_loss: str = "lpips",
        pixel_loss: str = "l1",
        perceptual_init: str = "pretrained",
        perceptual_weights: str | os.PathLike | None = None,
        use_discriminator: bool = True,
    ) -> None:
        if perceptual_loss not in PERCEPTUAL_LOSSES:
            raise ValueError(
                f"perceptual_loss={perceptual_loss!r}: choose {', '.join(PERCEPTUAL_LOSSES)} (perceptual_weight: 0 for none)"
            )
        if pixel_loss not in PIXEL_LOSSES:
            raise ValueError(f"pixel_loss={pixel_loss!r}: choose one of {', '.join(PIXEL_LOSSES)}")
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
        self.codebook_weight = codebook_weight
        self.n_classes = n_classes
        self.pixel_distance = PIXEL_LOSSES[pixel_loss]

    def pixel_loss(self, inputs: Tensor, reconstructions: Tensor) -> Tensor:
        return self.pixel_distance(inputs, reconstructions)

    def forward(
        self,
        codebook_loss: Tensor | None,
        inputs: Tensor,
        reconstructions: Tensor,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        predicted_indices: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, named logs) of the generator (optimizer_idx 0) or the discriminator (1).

        codebook_loss: of the quantizer, averaged here, None for none; inputs, reconstructions: (B, C, H, W) in [-1, 1];
        global_step: generator updates so far; last_layer: the weight of the decoder's last convolution;
        predicted_indices: the batch's codes, int64 of any shape; with them the log has `perplexity` and `cluster_usage` (a count).
        """
        inputs, reconstructions = inputs.float(), reconstructions.float()
        if optimizer_idx == DISCRIMINATOR:
            return self.discriminator_loss(inputs, reconstructions, cond, global_step, split)
        if optimizer_idx != GENERATOR:
            raise ValueError(f"optimizer_idx={optimizer_idx}: 0 is the generator, 1 the discriminator")
        quant_loss = inputs.new_zeros(()) if codebook_loss is None else codebook_loss.float().mean()
        rec_loss, p_loss = self.reconstruction_loss(inputs, reconstructions)  # (B, C, H, W), (B, 1, 1, 1)
        nll_loss = rec_loss.mean()
        adversarial = self.generator_term(nll_loss, reconstructions, cond, global_step, last_layer)
        loss = nll_loss + self.codebook_weight * quant_loss
        if adversarial.term is not None:
            loss = loss + adversarial.term
        log = {
            "total_loss": loss,
            "quant_loss": quant_loss,
            "nll_loss": nll_loss,
            "rec_loss": nll_loss,  # the same number here, published under both names
            "p_loss": p_loss.mean(),
            "d_weight": adversarial.d_weight,
            "disc_factor": torch.tensor(adversarial.disc_factor),
            "g_loss": adversarial.g_loss,
        }
        if predicted_indices is not None:
            log |= measure_perplexity(predicted_indices, self.n_classes or 0)._asdict()
        return loss, {f"{split}/{name}": value.detach().clone() for name, value in log.items()}
