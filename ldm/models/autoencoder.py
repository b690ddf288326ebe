"""First stages: from images to latents and back (LDM, arXiv 2112.10752, section 3.1 and appendix G)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ldm.config.types import PositiveInt
from ldm.models.adversarial import AdversarialAutoencoder
from ldm.models.training import Losses
from ldm.models.vq import VQModel, VQModelInterface
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.published import published_names

__all__ = ["AutoencoderKL", "IdentityFirstStage", "VQModel", "VQModelInterface"]


class AutoencoderKL(AdversarialAutoencoder):
    """Autoencoder with a diagonal Gaussian latent, weakly regularized towards N(0, 1).

    ddconfig: `double_z` true; embed_dim: channels of the latent; learn_logvar: train the likelihood's scale, as
    `learn_logvar` of the loss does. init_logvar: added to the posterior's log variance when training starts; 0, as
    published, starts with noise larger than the latent, and -8 lets small networks learn several times faster. Other
    arguments: see AdversarialAutoencoder.
    """

    def __init__(
        self,
        ddconfig: Annotated[Mapping[str, Any], "ldm.modules.diffusionmodules.model.Encoder"],
        lossconfig: Mapping[str, Any],
        embed_dim: PositiveInt,
        ckpt_path: str | Path | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: PositiveInt | None = None,
        monitor: str | None = None,
        *,
        learn_logvar: bool = False,
        init_logvar: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(ddconfig, lossconfig, ckpt_path, ignore_keys, image_key, colorize_nlabels, monitor, **kwargs)
        if not ddconfig.get("double_z", True):
            raise ValueError(
                "ddconfig.double_z=False: the KL autoencoder needs a mean and a log variance per channel; set it true"
            )
        z_channels = ddconfig["z_channels"]
        self.embed_dim = embed_dim
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, kernel_size=1)
        assert self.quant_conv.bias is not None
        self.quant_conv.bias.data[embed_dim:] += init_logvar
        if learn_logvar:
            if not isinstance(getattr(self.loss, "logvar", None), nn.Parameter):
                raise ValueError(f"learn_logvar: the loss {type(self.loss).__name__} has no logvar to learn")
            self.loss.logvar.requires_grad_(True)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Return the posterior over latents (B, embed_dim, H/f, W/f) of images x (B, C, H, W) in [-1, 1]."""
        return DiagonalGaussianDistribution(self.encode_to_prequant(x))

    def forward(self, input: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Return the reconstruction and the posterior of images (B, C, H, W), from a sample of it or from its mode."""
        posterior = self.encode(input)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def reconstruct(self, inputs: Tensor) -> tuple[Tensor, DiagonalGaussianDistribution]:
        return self(inputs)

    def loss_of(self, inputs: Tensor, reconstructions: Tensor, latent: Any, optimizer_idx: int, split: str) -> Losses:
        step, last_layer = self.generator_updates, self.get_last_layer()
        return self.loss(inputs, reconstructions, latent, optimizer_idx, step, last_layer=last_layer, split=split)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], only_inputs: bool = False, N: int | None = None, split: str = "train"
    ) -> dict[str, Tensor]:
        """Return `inputs`, `reconstructions` and `samples` decoded from N(0, 1), each (N, C, H, W) in [-1, 1]."""
        x = self.get_input(batch, self.image_key)[:N]
        log = {"inputs": x}
        if not only_inputs:
            reconstructions, posterior = self(x)
            log["samples"] = self.decode(torch.randn_like(posterior.mode()))
            log["reconstructions"] = reconstructions
        return {name: self.as_images(value) for name, value in log.items()}


class IdentityFirstStage(nn.Module):
    """First stage of a diffusion model in pixel space: every method returns its input.

    `vq_interface`: `quantize` returns the form of a VQ model. Arguments of other first stages are accepted and unused.
    """

    def __init__(self, *args: Any, vq_interface: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def decode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def quantize(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


__getattr__ = published_names(__name__)
