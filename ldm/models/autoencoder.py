"""First stages: pictures to latents and back (LDM, Rombach et al. 2022, arXiv 2112.10752, section 3.1 and appendix G)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.adversarial import AdversarialAutoencoder
from ldm.models.vq import VQModel, VQModelInterface
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.dtype import in_dtype, weights_dtype

__all__ = ["AutoencoderKL", "IdentityFirstStage", "VQModel", "VQModelInterface"]


class AutoencoderKL(AdversarialAutoencoder):
    """Autoencoder whose latent is a diagonal Gaussian, slightly pulled towards N(0, 1).

    ddconfig: arguments of Encoder and Decoder, `double_z` true; embed_dim: channels of the latent.
    image_key: key of the batch that holds the pictures; monitor: logged value that checkpoints are chosen by.
    scheduler_config: a schedule of ldm.lr_scheduler over generator updates, for both optimizers.
    learn_logvar: train the likelihood's scale, as `learn_logvar` of the loss does.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        learn_logvar: bool = False,
    ) -> None:
        super().__init__(ddconfig, lossconfig, image_key, colorize_nlabels, monitor, scheduler_config)
        if not ddconfig.get("double_z", True):
            raise ValueError(
                "ddconfig.double_z=False: the KL autoencoder needs a mean and a log variance per channel; set it true"
            )
        z_channels = ddconfig["z_channels"]
        self.embed_dim = embed_dim
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, kernel_size=1)
        if learn_logvar:
            if not isinstance(getattr(self.loss, "logvar", None), nn.Parameter):
                raise ValueError(f"learn_logvar: the loss {type(self.loss).__name__} has no logvar to learn")
            self.loss.logvar.requires_grad_(True)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """The posterior over latents (B, embed_dim, H/f, W/f) of pictures x (B, C, H, W) in [-1, 1]."""
        moments = in_dtype(weights_dtype(self.encoder), lambda x: self.quant_conv(self.encoder(x)), x)
        return DiagonalGaussianDistribution(moments)

    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, C, H, W), about [-1, 1], of latents z (B, embed_dim, H/f, W/f)."""
        return in_dtype(weights_dtype(self.decoder), lambda z: self.decoder(self.post_quant_conv(z)), z)

    def forward(self, input: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """(reconstruction, posterior) of pictures (B, C, H, W); from the posterior's mode where `sample_posterior` is false."""
        posterior = self.encode(input)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def reconstruct(self, inputs: Tensor) -> tuple[Tensor, DiagonalGaussianDistribution]:
        return self(inputs)

    def loss_of(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        latent: DiagonalGaussianDistribution,
        optimizer_idx: int,
        split: str,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        last_layer = self.get_last_layer()
        return self.loss(
            inputs, reconstructions, latent, optimizer_idx, self.generator_updates, last_layer=last_layer, split=split
        )

    def latent_parameters(self) -> list[nn.Parameter]:
        logvar = getattr(self.loss, "logvar", None)
        learned = [logvar] if isinstance(logvar, nn.Parameter) and logvar.requires_grad else []
        return [*self.quant_conv.parameters(), *self.post_quant_conv.parameters(), *learned]

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int | None = None, only_inputs: bool = False, split: str = "train"
    ) -> dict[str, Tensor]:
        """`inputs`, their `reconstructions` and `samples` decoded from N(0, 1), each (B, C, H, W) in [-1, 1], of the batch's first `N`."""
        x = self.get_input(batch, self.image_key)[:N]
        pictures = {"inputs": x}
        if not only_inputs:
            reconstructions, posterior = self(x)
            pictures["samples"] = self.decode(torch.randn_like(posterior.mode()))
            pictures["reconstructions"] = reconstructions
        return {name: self.as_pictures(value) for name, value in pictures.items()}


class IdentityFirstStage(nn.Module):
    """Stands where a diffusion model works on its pictures directly: every method gives back what it gets.

    `vq_interface` makes `quantize` answer in the form of a VQ model. Other arguments are those of the first stage whose place it takes.
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
