"""Quantizer of the VQ first stages: taming's `VectorQuantizer2` with a float32 search in little memory."""

from __future__ import annotations

import logging
import os

import numpy as np
import torch
from einops import rearrange
from taming.modules.vqvae.quantize import VectorQuantizer2 as TamingVectorQuantizer2
from torch import Tensor

logger = logging.getLogger(__name__)

DISTANCES_AT_ONCE = 2**25  # 128 MiB of float32; a batch of 256x256 images against 16,384 codes would take gigabytes


class VectorQuantizer2(TamingVectorQuantizer2):
    """Nearest codebook entry per position, with a straight-through gradient (VQ-VAE, arXiv 1711.00937, section 3.2).

    n_e, e_dim: number and width of the entries; beta: factor of the commitment term.
    legacy: as in the published models, beta weighs the codebook's term instead of the commitment's.
    sane_index_shape: codes as (B, H, W) instead of (B * H * W,).
    remap: .npy file with the k codes in use, int (k,); they are renumbered 0 to k - 1, and the others become
        unknown_index: 'random' (any of them), 'extra' (k) or a number.
    """

    keeps_float32 = True  # if weights are loaded in 16 bits: the nearest of rounded entries may be another one

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | os.PathLike | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        if n_e < 1 or e_dim < 1:
            raise ValueError(f"codebook of {n_e} entries of width {e_dim}: both must be at least 1")
        super().__init__(n_e, e_dim, beta, sane_index_shape=sane_index_shape, legacy=legacy)
        if remap is not None:
            self._remap(remap, unknown_index)

    def _remap(self, remap: str | os.PathLike, unknown_index: str | int) -> None:
        try:
            used = np.load(remap, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"remap={remap}: not a .npy file of numbers ({error})") from error
        integers = used.ndim == 1 and len(used) > 0 and np.issubdtype(used.dtype, np.integer)
        if not integers or used.min() < 0 or used.max() >= self.n_e:
            raise ValueError(
                f"remap={remap}: expected a list of codes from 0 to {self.n_e - 1}, got {used.dtype} {used.shape}"
            )
        self.remap = remap
        self.register_buffer("used", torch.tensor(used))
        self.re_embed = len(used) + (unknown_index == "extra")
        self.unknown_index = len(used) if unknown_index == "extra" else unknown_index
        if self.unknown_index != "random" and self.unknown_index not in range(self.re_embed):
            raise ValueError(
                f"unknown_index={unknown_index!r}: choose 'random', 'extra' or a number from 0 to {self.re_embed - 1}"
            )
        logger.info("codebook: %d codes remapped to %d (%s)", self.n_e, self.re_embed, remap)

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """(z_q in the dtype of z, codebook loss, (None, None, codes)) of latents z (B, e_dim, H, W).

        The other arguments belong to quantizers that sample; here they must keep their defaults.
        """
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError("temp, rescale_logits and return_logits are options of Gumbel quantizers, not of this one")
        batch, _, height, width = z.shape
        with torch.autocast(z.device.type, enabled=False):  # distances rounded to 16 bits would choose other codes
            latents = rearrange(z, "b c h w -> (b h w) c").float()
            codebook = self.embedding.weight.float()
            codes = self.nearest(latents, codebook)
            entries = codebook[codes]
            commitment = (latents - entries.detach()).square().mean()
            codebook_loss = (entries - latents.detach()).square().mean()
            weights = (1.0, self.beta) if self.legacy else (self.beta, 1.0)
            loss = weights[0] * commitment + weights[1] * codebook_loss
            entries = latents + (entries - latents).detach()  # straight-through gradient
        z_q = rearrange(entries, "(b h w) c -> b c h w", h=height, w=width).contiguous().to(z.dtype)
        if self.remap is not None:
            codes = self.remap_to_used(codes.reshape(batch, -1)).reshape(-1)
        if self.sane_index_shape:
            codes = codes.reshape(batch, height, width)
        return z_q, loss, (None, None, codes)

    @staticmethod
    @torch.no_grad()
    def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
        """Index (N,) int64 of the nearest row of codebook (n_e, e_dim) for each of latents (N, e_dim), both float32."""
        lengths = codebook.square().sum(dim=1)
        parts = latents.split(max(1, DISTANCES_AT_ONCE // len(codebook)))
        # |z - e|^2 = |z|^2 - 2 z e + |e|^2; the first term is the same for all entries
        return torch.cat([torch.addmm(lengths, part, codebook.T, alpha=-2).argmin(dim=1) for part in parts])

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """Codes in the codebook's numbering, from remapped ones (B, ...); 'extra' becomes the first used code."""
        return super().unmap_to_all(inds.clone())  # taming's writes into its argument
