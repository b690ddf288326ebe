"""Loss of a VQ autoencoder: pixels, LPIPS, codebook loss and adversarial term (VQGAN, arXiv 2012.09841, eqs. 4-7)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.config.types import NonNegativeFloat, NonNegativeInt, PositiveInt
from ldm.modules.losses.contperceptual import DummyLoss as DummyLoss
from ldm.modules.losses.reconstruction import AdversarialLoss, Logs, is_discriminator_turn, named_logs
from ldm.modules.ranks import average_over_ranks, number_of_ranks, rank_weight


class CodebookUse(NamedTuple):
    """Usage of a codebook, as float32 scalars."""

    perplexity: Tensor  # exp of the entropy of the codes' frequencies, in nats: from 1 to the number of entries
    cluster_usage: Tensor  # number of codes that occur


def codebook_use(counts: Tensor) -> CodebookUse:
    """Usage of a codebook from the number of occurrences of each code, counts: (n_embed,)."""
    frequencies = counts.float() / counts.sum().clamp(min=1)
    return CodebookUse(torch.special.entr(frequencies).sum().exp(), (counts > 0).sum().float())


def count_codes(codes: Tensor, n_embed: int) -> Tensor:
    """Number of occurrences of each of `n_embed` codes, (n_embed,); `bincount` would wait for the device."""
    codes = codes.flatten()
    size = n_embed or int(codes.max()) + 1  # a loss that does not know its codebook
    return codes.new_zeros(size).scatter_add_(0, codes, torch.ones_like(codes))


def measure_perplexity(predicted_indices: Tensor, n_embed: int) -> CodebookUse:
    """Usage of a codebook of `n_embed` entries by the batch of codes of all ranks (any shape, int64)."""
    counts = count_codes(predicted_indices, n_embed)
    return codebook_use(average_over_ranks(counts, number_of_ranks() * float(rank_weight() > 0)))


class VQLPIPSWithDiscriminator(AdversarialLoss):
    """nll + codebook_weight * codebook loss + d_weight * disc_factor * g_loss; averages, not sums as for KL.

    nll is the mean of pixelloss_weight * pixels + perceptual_weight * LPIPS; pixel_loss: 'l1' or 'l2'.
    n_classes: size of the codebook, for the log of its usage; VQModel sets its own.
    The other options are those of AdversarialLoss.
    """

    def __init__(
        self,
        disc_start: NonNegativeInt | None = None,
        codebook_weight: NonNegativeFloat = 1.0,
        n_classes: PositiveInt | None = None,
        perceptual_loss: str = "lpips",
        pixel_loss: str = "l1",
        **options: Any,
    ) -> None:
        if perceptual_loss != "lpips":  # the published code also lists clips and dists, which were never released
            raise ValueError(f"perceptual_loss={perceptual_loss!r}: choose lpips (or perceptual_weight: 0)")
        if pixel_loss not in ("l1", "l2"):
            raise ValueError(f"pixel_loss={pixel_loss!r}: choose one of l1, l2")
        super().__init__(disc_start=disc_start, **options)
        self.codebook_weight = codebook_weight
        self.n_classes = n_classes
        self.squared = pixel_loss == "l2"

    def pixel_loss(self, inputs: Tensor, reconstructions: Tensor) -> Tensor:
        difference = inputs - reconstructions
        return difference.square() if self.squared else difference.abs()

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
    ) -> tuple[Tensor, Logs]:
        """(loss, named logs) of the generator (optimizer_idx 0) or the discriminator (1).

        codebook_loss: the quantizer's, averaged here, or None; inputs, reconstructions: (B, C, H, W) in [-1, 1];
        global_step: generator updates so far; last_layer: weight of the decoder's last convolution;
        predicted_indices: codes of the batch, int64 of any shape; adds `perplexity` and `cluster_usage` to the logs.
        """
        inputs, reconstructions = inputs.float(), reconstructions.float()
        if is_discriminator_turn(optimizer_idx):
            return self.discriminator_loss(inputs, reconstructions, cond, global_step, split)
        quant_loss = inputs.new_zeros(()) if codebook_loss is None else codebook_loss.float().mean()
        rec_loss, p_loss = self.reconstruction_loss(inputs, reconstructions)  # (B, C, H, W), (B, 1, 1, 1)
        nll_loss = rec_loss.mean()
        loss, log = self.generator_loss(
            nll_loss + self.codebook_weight * quant_loss, nll_loss, reconstructions, cond, global_step, last_layer
        )
        # nll_loss and rec_loss are the same value, as published.
        log |= {"quant_loss": quant_loss, "nll_loss": nll_loss, "rec_loss": nll_loss, "p_loss": p_loss.mean()}
        if predicted_indices is not None:
            log |= measure_perplexity(predicted_indices, self.n_classes or 0)._asdict()
        return loss, named_logs(split, log)
