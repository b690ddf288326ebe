"""Vector-quantized first stages (VQGAN, Esser et al. 2021, arXiv 2012.09841; LDM, arXiv 2112.10752, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.types import PositiveFloat, PositiveInt
from ldm.models.adversarial import AdversarialAutoencoder
from ldm.models.training import Losses
from ldm.modules.ema import checked_ema
from ldm.modules.losses.reconstruction import GENERATOR
from ldm.modules.losses.vqperceptual import codebook_use, count_codes
from ldm.modules.ranks import rank_weight
from ldm.rng import Purpose, current_samples, mix

COMMITMENT = 0.25  # beta of the quantizer, the same in all published models
RESIZE_STEP = 16
LARGEST_FIRST = 5  # updates at the largest size, so that memory runs out at once or never


class VQModel(AdversarialAutoencoder):
    """Autoencoder with a grid of codes as its latent, each the nearest entry of a learned codebook.

    ddconfig: `double_z` false; n_embed, embed_dim: number and width of the codebook's entries.
    batch_resize_range: [smallest, largest] side of training batches, chosen at random each time in steps of 16.
    lr_g_factor: the generator's learning rate as a multiple of the discriminator's.
    remap, sane_index_shape: see VectorQuantizer2. use_ema: average all trained weights and validate the averages too;
    ema_config: see EMAConfig.
    Other arguments: see AdversarialAutoencoder.
    """

    trainable_loss = "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"

    def __init__(
        self,
        ddconfig: Annotated[Mapping[str, Any], "ldm.modules.diffusionmodules.model.Encoder"],
        lossconfig: Mapping[str, Any],
        n_embed: PositiveInt,
        embed_dim: PositiveInt,
        ckpt_path: str | Path | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: PositiveInt | None = None,
        monitor: str | None = None,
        batch_resize_range: Sequence[PositiveInt] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        lr_g_factor: PositiveFloat = 1.0,
        remap: str | Path | None = None,
        sane_index_shape: bool = False,
        use_ema: bool = False,
        optimizer_config: Annotated[Mapping[str, Any], "ldm.models.optimizers.OptimizerConfig"] | None = None,
        ema_config: Annotated[Mapping[str, Any], "ldm.modules.ema.EMAConfig"] | None = None,
    ) -> None:
        # Needs taming, which configs without a codebook work without.
        from ldm.modules.quantize import VectorQuantizer2

        super().__init__(
            ddconfig,
            lossconfig,
            ckpt_path,
            ignore_keys,
            image_key,
            colorize_nlabels,
            monitor,
            scheduler_config,
            optimizer_config,
        )
        if ddconfig.get("double_z", True):
            raise ValueError("ddconfig.double_z=True: a quantized latent has no variance; set it false")
        z_channels, factor = ddconfig["z_channels"], 2 ** (len(ddconfig["ch_mult"]) - 1)
        self.n_embed, self.embed_dim, self.lr_g_factor = n_embed, embed_dim, lr_g_factor
        self.batch_resize_range = None if batch_resize_range is None else _checked_range(batch_resize_range, factor)
        self.quantize = VectorQuantizer2(
            n_embed, embed_dim, beta=COMMITMENT, remap=remap, sane_index_shape=sane_index_shape
        )
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, kernel_size=1)
        known = getattr(self.loss, "n_classes", self.n_codes)
        if known is None:
            self.loss.n_classes = self.n_codes
        elif known < self.n_codes:
            raise ValueError(
                f"lossconfig.params.n_classes={known}: the codebook has {self.n_codes} entries; remove n_classes, "
                f"or set it to {self.n_codes}"
            )
        self._counts: dict[str, Tensor] = {}  # split -> occurrences of each code in this epoch, (n_codes,)
        averages = checked_ema(ema_config, use_ema)
        if use_ema:
            self.add_ema(averages)

    def averaged_module(self) -> nn.Module:
        return self

    @property
    def n_codes(self) -> int:
        """Number of codes: `n_embed`, or the length of `remap`."""
        return self.quantize.re_embed

    def encode(self, x: Tensor) -> Any:
        """Return (quantized latents (B, embed_dim, H/f, W/f), codebook loss, (None, None, codes)) of images."""
        return self.quantize(self.encode_to_prequant(x))

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Return images (B, C, H, W) of codes (B, H/f, W/f), numbered as in `encode`."""
        if code_b.ndim != 3:
            raise ValueError(
                f"codes of shape {tuple(code_b.shape)}: expected (B, H/f, W/f), the shape with sane_index_shape: true"
            )
        return self.decode_latent(self.quantize.get_codebook_entry(code_b, (*code_b.shape, self.embed_dim)))

    def forward(self, input: Tensor, return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """Return reconstruction and codebook loss of images (B, C, H, W), and the codes if `return_pred_indices`."""
        quant, codebook_loss, (_, _, codes) = self.quantize(self.encode_to_prequant(input))
        reconstruction = self.decode_latent(quant)
        return (reconstruction, codebook_loss, codes) if return_pred_indices else (reconstruction, codebook_loss)

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """Return images as (B, C, H, W) float32; in training squares with a side in `batch_resize_range`."""
        x = super().get_input(batch, k)
        if self.batch_resize_range is None or not self.training:
            return x
        sides = range(self.batch_resize_range[0], self.batch_resize_range[1] + 1, RESIZE_STEP)
        side = sides[self._random_below(len(sides)) if self.generator_updates >= LARGEST_FIRST else -1]
        if x.shape[2:] == (side, side):
            return x
        return F.interpolate(x, size=(side, side), mode="bicubic", antialias=True).clamp(-1.0, 1.0)

    def _random_below(self, high: int) -> int:
        """Return a random integer in [0, high): one for all samples of an update, on all ranks."""
        samples = current_samples()
        if samples is None:
            return int(torch.randint(high, ()))
        return mix(samples.seed, Purpose.IMAGE_SIDE, self.generator_updates) % high

    def reconstruct(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        reconstruction, codebook_loss, codes = self(inputs, return_pred_indices=True)
        return reconstruction, (codebook_loss, codes)

    def loss_of(self, inputs: Tensor, reconstructions: Tensor, latent: Any, optimizer_idx: int, split: str) -> Losses:
        codebook_loss, codes = latent
        if optimizer_idx == GENERATOR:
            counts = count_codes(codes, self.n_codes) * int(rank_weight() > 0)
            self._counts[split] = self._counts[split] + counts if split in self._counts else counts
        options = {"last_layer": self.get_last_layer(), "split": split, "predicted_indices": codes}
        step = self.generator_updates
        loss, log = self.loss(codebook_loss, inputs, reconstructions, optimizer_idx, step, **options)
        if optimizer_idx == GENERATOR and split != "train":
            log[f"{split}/aeloss"] = loss.detach()  # the published monitor, equal to total_loss
        return loss, log

    def on_train_epoch_end(self) -> None:
        self._log_codebook("train")

    def on_validation_epoch_end(self) -> None:
        self._log_codebook("val")
        self._log_codebook("val_ema")

    def _log_codebook(self, split: str) -> None:
        """Log the use of the codebook in the whole epoch, on all ranks: a batch may have fewer positions than codes."""
        if split not in self._counts:
            return
        use = codebook_use(self.trainer.strategy.reduce(self._counts.pop(split), reduce_op="sum"))
        self.log(f"{split}/codebook_usage", use.cluster_usage / self.n_codes)
        self.log(f"{split}/codebook_perplexity", use.perplexity)

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Any],
        only_inputs: bool = False,
        plot_ema: bool = False,
        N: int | None = None,
        split: str = "train",
    ) -> dict[str, Tensor]:
        """Return `inputs`, `reconstructions` and with `plot_ema` `reconstructions_ema`, (N, C, H, W) in [-1, 1]."""
        if plot_ema and not self.use_ema:
            raise ValueError("plot_ema: this model has no averages; set use_ema: true")
        x = self.get_input(batch, self.image_key)[:N]
        log = {"inputs": x}
        if not only_inputs:
            log["reconstructions"] = self(x)[0]
            if plot_ema:
                with self.ema_scope():
                    log["reconstructions_ema"] = self(x)[0]
        return {name: self.as_images(value) for name, value in log.items()}


class VQModelInterface(VQModel):
    """VQ first stage of diffusion models: latents are those before quantization, and decoding quantizes them."""

    def __init__(self, embed_dim: int, *args: Any, **kwargs: Any) -> None:
        """Positional arguments, as published: embed_dim, then ddconfig, lossconfig, n_embed."""
        kwargs["embed_dim"] = embed_dim
        super().__init__(*args, **kwargs)

    def encode(self, x: Tensor) -> Tensor:
        """Return latents before quantization, (B, embed_dim, H/f, W/f), of images x (B, C, H, W) in [-1, 1]."""
        return self.encode_to_prequant(x)

    def decode(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Quantize latents z (B, embed_dim, H/f, W/f) unless forced not to, and decode them to images (B, C, H, W)."""
        return self.decode_latent(z if force_not_quantize else self.quantize(z)[0])


def _checked_range(batch_resize_range: Sequence[int], factor: int) -> tuple[int, int]:
    smallest, largest = (int(side) for side in batch_resize_range)
    wrong = [side for side in range(smallest, largest + 1, RESIZE_STEP) if side % factor]
    if not 0 < smallest <= largest or (largest - smallest) % RESIZE_STEP or wrong:
        raise ValueError(
            f"batch_resize_range={[smallest, largest]}: expected [smallest, largest] that differ by a multiple of "
            f"{RESIZE_STEP}, all sides multiples of the downsampling factor {factor}"
        )
    return smallest, largest
