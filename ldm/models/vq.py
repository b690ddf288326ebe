"""The vector-quantized first stage (VQGAN, Esser et al. 2021, arXiv 2012.09841; LDM, arXiv 2112.10752, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.adversarial import AdversarialAutoencoder
from ldm.modules.dtype import in_dtype, weights_dtype
from ldm.modules.ema import LitEma
from ldm.modules.losses.reconstruction import GENERATOR
from ldm.modules.losses.vqperceptual import codebook_use

COMMITMENT = 0.25  # beta of the quantizer, the same in all published models
RESIZE_STEP = 16
LARGEST_FIRST = 5  # updates at the largest size, so that memory runs out at once or never


class VQModel(AdversarialAutoencoder):
    """Autoencoder whose latent is a grid of codes, each the nearest entry of a learned codebook.

    ddconfig: arguments of Encoder and Decoder, `double_z` false; n_embed, embed_dim: number and width of the codebook's entries.
    image_key: key of the batch that holds the pictures; monitor: logged value that checkpoints are chosen by.
    batch_resize_range: [smallest, largest] side that training batches are resized to, drawn anew each time in steps of 16.
    scheduler_config: a schedule of ldm.lr_scheduler over generator updates, for both optimizers.
    lr_g_factor: the generator's learning rate as a multiple of the discriminator's.
    remap, sane_index_shape: see VectorQuantizer2.
    use_ema: keep an average of all trained weights and validate it too, as `val_ema/...`.
    """

    loss_target = "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        batch_resize_range: Sequence[int] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        lr_g_factor: float = 1.0,
        remap: str | None = None,
        sane_index_shape: bool = False,
        use_ema: bool = False,
    ) -> None:
        # taming is imported where it is needed: configs without a codebook work without it.
        from ldm.modules.quantize import VectorQuantizer2

        super().__init__(ddconfig, lossconfig, image_key, colorize_nlabels, monitor, scheduler_config)
        if ddconfig.get("double_z", True):
            raise ValueError("ddconfig.double_z=True: a quantized latent has no variance; set it false")
        if lr_g_factor <= 0:
            raise ValueError(f"lr_g_factor={lr_g_factor}: must be above 0")
        z_channels = ddconfig["z_channels"]
        self.n_embed, self.embed_dim = n_embed, embed_dim
        self.lr_g_factor = lr_g_factor
        factor = 2 ** (len(ddconfig["ch_mult"]) - 1)
        self.batch_resize_range = None if batch_resize_range is None else _checked_range(batch_resize_range, factor)
        self.quantize = VectorQuantizer2(
            n_embed, embed_dim, beta=COMMITMENT, remap=remap, sane_index_shape=sane_index_shape
        )
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, kernel_size=1)
        if getattr(self.loss, "n_classes", self.n_codes) is None:
            self.loss.n_classes = self.n_codes
        self._counts: dict[str, Tensor] = {}  # split -> how often each code occurred since the epoch began, (n_codes,)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    @property
    def n_codes(self) -> int:
        """How many codes there are: `n_embed`, or those that `remap` names."""
        return self.quantize.re_embed

    # ------------------------------------------------------------------------------------------------ pictures and codes

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Latents before quantization, (B, embed_dim, H/f, W/f), of pictures x (B, C, H, W) in [-1, 1]."""
        return in_dtype(weights_dtype(self.encoder), lambda x: self.quant_conv(self.encoder(x)), x)

    def encode(self, x: Tensor) -> Any:
        """(quantized latents (B, embed_dim, H/f, W/f), codebook loss, (None, None, codes)) of pictures x (B, C, H, W) in [-1, 1]."""
        return self.quantize(self.encode_to_prequant(x))

    def decode(self, quant: Tensor) -> Tensor:
        """Pictures (B, C, H, W), about [-1, 1], of quantized latents (B, embed_dim, H/f, W/f)."""
        return self._decode_quantized(quant)

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Pictures (B, C, H, W) of codes (B, H/f, W/f), numbered as `encode` numbers them."""
        if code_b.ndim != 3:
            raise ValueError(
                f"codes of shape {tuple(code_b.shape)}: expected (B, H/f, W/f); sane_index_shape: true gives them so"
            )
        return self._decode_quantized(self.quantize.get_codebook_entry(code_b, (*code_b.shape, self.embed_dim)))

    def _decode_quantized(self, quant: Tensor) -> Tensor:
        return in_dtype(weights_dtype(self.decoder), lambda quant: self.decoder(self.post_quant_conv(quant)), quant)

    def forward(self, input: Tensor, return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """(reconstruction, codebook loss) of pictures (B, C, H, W), and their codes where `return_pred_indices` is true."""
        quant, codebook_loss, (_, _, codes) = self.quantize(self.encode_to_prequant(input))
        reconstruction = self._decode_quantized(quant)
        return (reconstruction, codebook_loss, codes) if return_pred_indices else (reconstruction, codebook_loss)

    # ---------------------------------------------------------------------------------------------------------- training

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """Pictures under key `k`: (B, H, W[, C]) -> (B, C, H, W) float32; in training squares of a side in `batch_resize_range`."""
        x = super().get_input(batch, k)
        if self.batch_resize_range is None or not self.training:
            return x
        sides = range(self.batch_resize_range[0], self.batch_resize_range[1] + 1, RESIZE_STEP)
        side = sides[int(torch.randint(len(sides), ())) if self.generator_updates >= LARGEST_FIRST else -1]
        if x.shape[2:] == (side, side):
            return x
        return F.interpolate(x, size=(side, side), mode="bicubic", antialias=True).clamp(-1.0, 1.0)

    def reconstruct(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        reconstruction, codebook_loss, codes = self(inputs, return_pred_indices=True)
        return reconstruction, (codebook_loss, codes)

    def loss_of(
        self, inputs: Tensor, reconstructions: Tensor, latent: tuple[Tensor, Tensor], optimizer_idx: int, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        codebook_loss, codes = latent
        if optimizer_idx == GENERATOR:
            counts = torch.bincount(codes.flatten(), minlength=self.n_codes)
            self._counts[split] = self._counts[split] + counts if split in self._counts else counts
        loss, log = self.loss(
            codebook_loss,
            inputs,
            reconstructions,
            optimizer_idx,
            self.generator_updates,
            last_layer=self.get_last_layer(),
            split=split,
            predicted_indices=codes,
        )
        if optimizer_idx == GENERATOR and split != "train":
            log[f"{split}/aeloss"] = loss.detach()  # published beside total_loss, so that monitors may name it
        return loss, log

    def latent_parameters(self) -> list[nn.Parameter]:
        return [*self.quantize.parameters(), *self.quant_conv.parameters(), *self.post_quant_conv.parameters()]

    def on_generator_update(self) -> None:
        if self.use_ema:
            self.model_ema(self)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Within it the model has its averaged weights; the trained ones come back whatever happens. Scopes may nest."""
        if not self.use_ema:
            yield
            return
        averaged = [parameter for name, parameter in self.named_parameters() if name in self.model_ema.m_name2s_name]
        self.model_ema.store(averaged)
        self.model_ema.copy_to(self)
        try:
            yield
        finally:
            self.model_ema.restore(averaged)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the losses on held-out pictures as `val/...` and, with `use_ema`, those of the averaged weights as `val_ema/...`."""
        self._log_validation(batch, split="val")
        if self.use_ema:
            with self.ema_scope():
                self._log_validation(batch, split="val_ema")

    def on_train_epoch_end(self) -> None:
        self._log_codebook("train")

    def on_validation_epoch_end(self) -> None:
        self._log_codebook("val")
        self._log_codebook("val_ema")

    def _log_codebook(self, split: str) -> None:
        """Use of the codebook by the whole epoch, on all ranks: a batch alone may have fewer positions than there are codes."""
        if split not in self._counts:
            return
        counts = self.trainer.strategy.reduce(self._counts.pop(split), reduce_op="sum")
        use = codebook_use(counts)
        self.log_dict(
            {
                f"{split}/codebook_usage": use.cluster_usage / self.n_codes,
                f"{split}/codebook_perplexity": use.perplexity,
            }
        )

    # ---------------------------------------------------------------------------------------------------------- pictures

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Any],
        N: int | None = None,
        only_inputs: bool = False,
        plot_ema: bool = False,
        split: str = "train",
    ) -> dict[str, Tensor]:
        """`inputs`, `reconstructions` and, with `plot_ema`, `reconstructions_ema`, each (B, C, H, W) in [-1, 1], of the first `N`."""
        x = self.get_input(batch, self.image_key)[:N]
        pictures = {"inputs": x}
        if not only_inputs:
            pictures["reconstructions"] = self(x)[0]
            if plot_ema:
                if not self.use_ema:
                    raise ValueError("plot_ema: this model keeps no average; set use_ema: true")
                with self.ema_scope():
                    pictures["reconstructions_ema"] = self(x)[0]
        return {name: self.as_pictures(value) for name, value in pictures.items()}


class VQModelInterface(VQModel):
    """The VQ first stage as diffusion models use it: they work on latents before quantization, and decoding quantizes."""

    def encode(self, x: Tensor) -> Tensor:
        """Latents before quantization, (B, embed_dim, H/f, W/f), of pictures x (B, C, H, W) in [-1, 1]."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Pictures (B, C, H, W), about [-1, 1], of latents h (B, embed_dim, H/f, W/f), quantized first unless told not to."""
        return self._decode_quantized(h if force_not_quantize else self.quantize(h)[0])


def _checked_range(batch_resize_range: Sequence[int], factor: int) -> tuple[int, int]:
    smallest, largest = (int(side) for side in batch_resize_range)
    wrong = [side for side in range(smallest, largest + 1, RESIZE_STEP) if side % factor]
    if not 0 < smallest <= largest or (largest - smallest) % RESIZE_STEP or wrong:
        raise ValueError(
            f"batch_resize_range={[smallest, largest]}: expected [smallest, largest] {RESIZE_STEP} or a multiple of it apart, "
            f"all sides multiples of the downsampling factor {factor}"
        )
    return smallest, largest
