"""Base of the autoencoders' losses: pixels plus LPIPS, and a patch discriminator with an adaptive weight.

VQGAN (Esser et al. 2021, arXiv 2012.09841, eqs. 5-7); LDM (Rombach et al. 2022, arXiv 2112.10752, eq. 25).
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from taming.modules.util import ActNorm
from torch import Tensor, nn

from ldm.config.types import NonNegativeFloat, NonNegativeInt, PositiveInt
from ldm.modules.dtype import in_dtype, weights_dtype
from ldm.modules.losses.lpips import LPIPS
from ldm.modules.ranks import SharedBatchNorm2d, average_over_ranks, number_of_ranks, rank_weight

GENERATOR, DISCRIMINATOR = 0, 1  # the published `optimizer_idx`

Logs = dict[str, Tensor]


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


class AdversarialLoss(nn.Module):
    """Base of `LPIPSWithDiscriminator` (KL) and `VQLPIPSWithDiscriminator` (VQ).

    disc_start: number of generator updates before the discriminator takes part.
    disc_factor, disc_weight: factors of the adversarial terms. If one is 0, the discriminator is kept in the state_dict
        but never runs; `use_discriminator: false` does not build it.
    perceptual_weight: factor of LPIPS; 0 builds no perceptual network.
    perceptual_init: 'pretrained' (`load_pretrained` must run before the first step) or 'random' (tests).
    perceptual_weights: local file with VGG16 or a whole LPIPS.
    """

    def __init__(
        self,
        *,
        disc_start: NonNegativeInt | None = None,
        pixelloss_weight: NonNegativeFloat = 1.0,
        disc_num_layers: PositiveInt = 3,
        disc_in_channels: PositiveInt = 3,
        disc_ndf: PositiveInt = 64,
        disc_factor: NonNegativeFloat = 1.0,
        disc_weight: NonNegativeFloat = 1.0,
        perceptual_weight: NonNegativeFloat = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
        perceptual_init: str = "pretrained",
        perceptual_weights: str | os.PathLike | None = None,
        use_discriminator: bool = True,
    ) -> None:
        super().__init__()
        if disc_loss not in DISC_LOSSES:
            raise ValueError(f"disc_loss={disc_loss!r}: choose one of {', '.join(DISC_LOSSES)}")
        if perceptual_init not in ("pretrained", "random"):
            raise ValueError(f"perceptual_init={perceptual_init!r}: choose one of pretrained, random")
        if use_discriminator and disc_start is None:
            raise ValueError(
                "disc_start is missing: set the generator update at which the discriminator starts, or set "
                "use_discriminator: false"
            )
        factors = {"perceptual_weight": perceptual_weight, "disc_factor": disc_factor, "disc_weight": disc_weight}
        for name, value in factors.items():
            if value < 0:
                raise ValueError(f"{name}={value}: must not be negative; 0 disables it")
        self.pixel_weight = pixelloss_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual_init = perceptual_init
        self.perceptual_loss = LPIPS(perceptual_weights) if perceptual_weight > 0 else None
        self.discriminator_iter_start = disc_start or 0
        self.disc_factor = disc_factor
        self.discriminator_weight = disc_weight
        self.disc_conditional = disc_conditional
        self.disc_loss = DISC_LOSSES[disc_loss]
        self.discriminator: nn.Module | None = None
        if use_discriminator:
            network = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers, use_actnorm)
            self.discriminator = share_statistics(network.apply(weights_init))

    @property
    def adversarial(self) -> bool:
        """True if the discriminator is, or will be, trained."""
        return self.discriminator is not None and self.disc_factor > 0 and self.discriminator_weight > 0

    def disc_factor_at(self, global_step: int) -> float:
        """Factor of the adversarial terms at this generator update: 0 before `disc_start`."""
        return adopt_weight(self.disc_factor, global_step, self.discriminator_iter_start) if self.adversarial else 0.0

    def load_pretrained(self) -> None:
        """Load LPIPS' trained weights if they are needed; may download. Raises PerceptualWeightsError, see LPIPS."""
        if self.perceptual_loss is not None and self.perceptual_init == "pretrained":
            self.perceptual_loss.load_pretrained()

    def reconstruction_loss(self, inputs: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """(pixel_weight * |x - x_rec| + perceptual_weight * LPIPS, LPIPS): (B, C, H, W) and (B, 1, 1, 1) float32."""
        pixels = self.pixel_weight * self.pixel_loss(inputs, reconstructions)
        if self.perceptual_loss is None:
            return pixels, pixels.new_zeros(1, 1, 1, 1)
        perceptual = self.perceptual_loss(inputs, reconstructions).float()
        return pixels + self.perceptual_weight * perceptual, perceptual

    def pixel_loss(self, inputs: Tensor, reconstructions: Tensor) -> Tensor:
        """|x - x_rec|, element by element."""
        return (inputs - reconstructions).abs()

    def generator_loss(
        self,
        loss: Tensor,
        nll_loss: Tensor,
        reconstructions: Tensor,
        cond: Tensor | None,
        global_step: int,
        last_layer: Tensor | None,
    ) -> tuple[Tensor, Logs]:
        """`loss` + d_weight * disc_factor * -E[D(x_rec)], and the logs of its parts.

        As published, d_weight and g_loss are also computed and logged before `disc_start`, but not added to the loss.
        """
        d_weight = g_loss = nll_loss.new_zeros(())
        if self.adversarial:
            g_loss = -self.logits(reconstructions, cond).mean()
            if reconstructions.requires_grad:  # in validation d_weight is 0, as published
                d_weight = self.calculate_adaptive_weight(nll_loss, g_loss, last_layer)
        disc_factor = self.disc_factor_at(global_step)
        if disc_factor > 0:  # a factor of 0 would not stop a NaN
            loss = loss + d_weight * disc_factor * g_loss
        log = {"total_loss": loss, "d_weight": d_weight, "disc_factor": torch.tensor(disc_factor), "g_loss": g_loss}
        return loss, log

    def calculate_adaptive_weight(self, nll_loss: Tensor, g_loss: Tensor, last_layer: Tensor | None) -> Tensor:
        """disc_weight * |d nll / d w| / (|d g / d w| + 1e-4), w being the decoder's last layer (VQGAN eq. 7).

        A float32 scalar without gradient; the ratio is at most 1e4. The gradients are those of all ranks' samples.
        """
        if last_layer is None:
            raise ValueError("last_layer is missing: the adaptive weight needs the decoder's last layer")
        weight = rank_weight()
        nll_norm, g_norm = (
            average_over_ranks(torch.autograd.grad(loss * weight, last_layer, retain_graph=True)[0]).norm()
            for loss in (nll_loss, g_loss)
        )
        return (nll_norm / (g_norm + 1e-4)).clamp(0.0, 1e4).detach() * self.discriminator_weight

    def discriminator_loss(
        self, inputs: Tensor, reconstructions: Tensor, cond: Tensor | None, global_step: int, split: str
    ) -> tuple[Tensor, Logs]:
        """Loss of the discriminator on detached images, and its logs; before `disc_start` a 0 without gradient."""
        disc_factor = self.disc_factor_at(global_step)
        with torch.set_grad_enabled(torch.is_grad_enabled() and disc_factor > 0):
            real, fake = self.logits(inputs.detach(), cond), self.logits(reconstructions.detach(), cond)
            loss = disc_factor * self.disc_loss(real, fake) if disc_factor > 0 else real.new_zeros(())
        return loss, named_logs(split, {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()})

    def logits(self, images: Tensor, cond: Tensor | None) -> Tensor:
        """Discriminator logits per patch, (B, 1, h, w) float32; `cond` is concatenated to the images' channels."""
        if self.discriminator is None:
            raise ValueError("this loss was built with use_discriminator: false")
        if (cond is not None) != self.disc_conditional:
            given = "missing" if cond is None else "given"
            raise ValueError(f"disc_conditional={self.disc_conditional}, but cond is {given}")
        x = images.contiguous() if cond is None else torch.cat((images, cond), dim=1)
        return in_dtype(weights_dtype(self.discriminator), self.discriminator, x).float()


def share_statistics(network: nn.Module) -> nn.Module:
    """Let the normalizations of a network use statistics of the batch of all ranks, as on one rank."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm2d
        elif type(module) is ActNorm:
            module.__class__ = SharedActNorm
    return network


class SharedActNorm(ActNorm):
    """ActNorm whose first values come from the samples of all ranks; from each rank's own, the ranks would differ."""

    @torch.no_grad()
    def initialize(self, input: Tensor) -> None:
        if number_of_ranks() == 1:
            return super().initialize(input)
        x = input.float()
        mean = average_over_ranks(x.mean(dim=(0, 2, 3)), rank_weight())  # (C,)
        square = average_over_ranks((x - mean[:, None, None]).square().mean(dim=(0, 2, 3)), rank_weight())
        n = input.numel() // input.shape[1] * number_of_ranks()
        self.loc.copy_(-mean[None, :, None, None])
        self.scale.copy_(1 / ((square * n / (n - 1)).sqrt() + 1e-6)[None, :, None, None])


def is_discriminator_turn(optimizer_idx: int) -> bool:
    """True for the discriminator's index, False for the generator's; ValueError for any other."""
    if optimizer_idx not in (GENERATOR, DISCRIMINATOR):
        raise ValueError(f"optimizer_idx={optimizer_idx}: 0 is the generator, 1 the discriminator")
    return optimizer_idx == DISCRIMINATOR


def named_logs(split: str, values: Logs) -> Logs:
    """Detached copies, named '{split}/{name}'."""
    return {f"{split}/{name}": value.detach().clone() for name, value in values.items()}
