"""What the reconstruction losses of KL and VQ autoencoders share: pixels plus LPIPS, and a patch discriminator with an adaptive weight.

VQGAN (Esser et al. 2021, arXiv 2012.09841, eqs. 5-7); LDM (Rombach et al. 2022, arXiv 2112.10752, eq. 25).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.losses.lpips import LPIPS

PERCEPTUAL_INITS = ("pretrained", "random")
GENERATOR, DISCRIMINATOR = 0, 1  # the published `optimizer_idx`


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """0.5 * (E[max(0, 1 - real)] + E[max(0, 1 + fake)]), a scalar (Lim & Ye 2017, arXiv 1705.02894)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """0.5 * (E[softplus(-real)] + E[softplus(fake)]), a scalar: the original GAN's loss on logits (arXiv 1406.2661)."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


DISC_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


def adopt_weight(weight: float, global_step: int, threshold: int = 0, value: float = 0.0) -> float:
    """`value` until `global_step` reaches `threshold`, then `weight`."""
    return value if global_step < threshold else weight


class GeneratorTerm(NamedTuple):
    """The adversarial part of the generator's loss."""

    term: Tensor | None  # what is added to the loss; None while it has no say, since its factor 0 would not stop a NaN
    d_weight: Tensor
    disc_factor: float
    g_loss: Tensor


class AdversarialLoss(nn.Module):
    """Base of `LPIPSWithDiscriminator` (KL) and `VQLPIPSWithDiscriminator` (VQ).

    disc_start: number of generator updates before the discriminator takes part.
    disc_factor, disc_weight: factors of the adversarial terms; where one of them is 0 the step does no adversarial work at all, and the
        discriminator's weights stay in the state_dict untouched. `use_discriminator: false` does not build it.
    perceptual_weight: factor of LPIPS; 0 builds no perceptual network.
    perceptual_init: 'pretrained' (before the first step LPIPS' weights must have been loaded, see `load_pretrained`) or 'random' (tests).
    perceptual_weights: local file with VGG16 or a whole LPIPS.
    """

    def __init__(
        self,
        *,
        disc_start: int | None,
        pixelloss_weight: float,
        disc_num_layers: int,
        disc_in_channels: int,
        disc_ndf: int,
        disc_factor: float,
        disc_weight: float,
        perceptual_weight: float,
        use_actnorm: bool,
        disc_conditional: bool,
        disc_loss: str,
        perceptual_init: str,
        perceptual_weights: str | os.PathLike | None,
        use_discriminator: bool,
    ) -> None:
        super().__init__()
        if disc_loss not in DISC_LOSSES:
            raise ValueError(f"disc_loss={disc_loss!r}: choose one of {', '.join(DISC_LOSSES)}")
        if perceptual_init not in PERCEPTUAL_INITS:
            raise ValueError(f"perceptual_init={perceptual_init!r}: choose one of {', '.join(PERCEPTUAL_INITS)}")
        if use_discriminator and disc_start is None:
            raise ValueError(
                "disc_start is missing: the generator update at which the discriminator starts (or use_discriminator: false)"
            )
        for name, value in (
            ("perceptual_weight", perceptual_weight),
            ("disc_factor", disc_factor),
            ("disc_weight", disc_weight),
        ):
            if value < 0:
                raise ValueError(f"{name}={value}: must not be negative; 0 switches it off")
        self.pixel_weight = pixelloss_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual_init = perceptual_init
        self.perceptual_loss = LPIPS(perceptual_weights) if perceptual_weight > 0 else None
        self.discriminator_iter_start = disc_start or 0
        self.disc_factor = disc_factor
        self.discriminator_weight = disc_weight
        self.disc_conditional = disc_conditional
        self.disc_loss = DISC_LOSSES[disc_loss]
        self.discriminator = (
            _discriminator(disc_in_channels, disc_ndf, disc_num_layers, use_actnorm) if use_discriminator else None
        )

    @property
    def adversarial(self) -> bool:
        """Whether there is an adversarial game at all, now or later."""
        return self.discriminator is not None and self.disc_factor > 0 and self.discriminator_weight > 0

    def disc_factor_at(self, global_step: int) -> float:
        """Factor of the adversarial terms at this generator update: 0 before `disc_start`."""
        return adopt_weight(self.disc_factor, global_step, self.discriminator_iter_start) if self.adversarial else 0.0

    def load_pretrained(self) -> None:
        """Make sure that the perceptual network is a trained one; may download. Raises PerceptualWeightsError, see LPIPS."""
        if self.perceptual_loss is not None and self.perceptual_init == "pretrained":
            self.perceptual_loss.load_pretrained()

    def reconstruction_loss(self, inputs: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """(pixel_weight * |x - x_rec| + perceptual_weight * LPIPS, LPIPS): (B, C, H, W) and (B, 1, 1, 1), in float32."""
        pixels = self.pixel_weight * self.pixel_loss(inputs, reconstructions)
        if self.perceptual_loss is None:
            return pixels, pixels.new_zeros(1, 1, 1, 1)
        perceptual = self.perceptual_loss(inputs, reconstructions).float()
        return pixels + self.perceptual_weight * perceptual, perceptual

    def pixel_loss(self, inputs: Tensor, reconstructions: Tensor) -> Tensor:
        """|x - x_rec|, element by element."""
        return (inputs - reconstructions).abs()

    def generator_term(
        self,
        nll_loss: Tensor,
        reconstructions: Tensor,
        cond: Tensor | None,
        global_step: int,
        last_layer: Tensor | None,
    ) -> GeneratorTerm:
        """What the discriminator adds to the generator's loss: d_weight * disc_factor * -E[D(x_rec)].

        As published d_weight and g_loss are computed, and logged, before `disc_start` as well; they become a part of the loss only then.
        """
        zero = nll_loss.new_zeros(())
        if not self.adversarial:
            return GeneratorTerm(None, zero, 0.0, zero)
        g_loss = -self.logits(reconstructions, cond).mean()
        # Without a graph (validation) there is nothing to balance, and the weight is 0 as published.
        d_weight = (
            self.calculate_adaptive_weight(nll_loss, g_loss, last_layer) if reconstructions.requires_grad else zero
        )
        disc_factor = self.disc_factor_at(global_step)
        return GeneratorTerm(
            d_weight * disc_factor * g_loss if disc_factor > 0 else None, d_weight, disc_factor, g_loss.detach()
        )

    def calculate_adaptive_weight(self, nll_loss: Tensor, g_loss: Tensor, last_layer: Tensor | None) -> Tensor:
        """disc_weight * |d nll / d w| / (|d g / d w| + 1e-4), the ratio at most 1e4, w the decoder's last layer (VQGAN eq. 7).

        A scalar in float32 without gradient.
        """
        if last_layer is None:
            raise ValueError("last_layer: the adaptive weight needs the weight of the decoder's last layer")
        nll_norm, g_norm = (
            torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm() for loss in (nll_loss, g_loss)
        )
        return (nll_norm / (g_norm + 1e-4)).clamp(0.0, 1e4).detach() * self.discriminator_weight

    def discriminator_loss(
        self, inputs: Tensor, reconstructions: Tensor, cond: Tensor | None, global_step: int, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss on detached pictures, and its named logs. Exactly 0, without a graph, before `disc_start`."""
        disc_factor = self.disc_factor_at(global_step)
        with torch.set_grad_enabled(torch.is_grad_enabled() and disc_factor > 0):
            logits_real = self.logits(inputs.detach(), cond)
            logits_fake = self.logits(reconstructions.detach(), cond)
            loss = (
                disc_factor * self.disc_loss(logits_real, logits_fake) if disc_factor > 0 else logits_real.new_zeros(())
            )
        log = {"disc_loss": loss, "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
        return loss, {f"{split}/{name}": value.detach() for name, value in log.items()}

    def logits(self, pictures: Tensor, cond: Tensor | None) -> Tensor:
        """The discriminator's verdict on each patch, (B, 1, h, w) in float32; a conditional one sees `cond` as further channels."""
        if (cond is not None) != self.disc_conditional:
            raise ValueError(
                f"disc_conditional={self.disc_conditional}, but cond is {'missing' if cond is None else 'given'}"
            )
        pictures = pictures.contiguous()
        return self.discriminator(pictures if cond is None else torch.cat((pictures, cond), dim=1)).float()


def _discriminator(in_channels: int, ndf: int, num_layers: int, use_actnorm: bool) -> nn.Module:
    # taming is imported where it is needed: configs without a discriminator work without it.
    from taming.modules.discriminator.model import NLayerDiscriminator, weights_init

    return NLayerDiscriminator(input_nc=in_channels, ndf=ndf, n_layers=num_layers, use_actnorm=use_actnorm).apply(
        weights_init
    )
