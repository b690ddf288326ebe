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

DISTANCES_AT_ONCE = 2**25  # 128 MiB of float32; a batch of 256x256 images and 16,384 codes would need gigabytes


class VectorQuantizer2(TamingVectorQuantizer2):
    """Nearest codebook entry per position, with a straight-through gradient (VQ-VAE, arXiv 1711.00937, section 3.2).

    n_e, e_dim: number and width of the entries; beta: factor of the commitment term.
    legacy: multiply the codebook term by beta instead of the commitment term, as the published models do.
    sane_index_shape: codes as (B, H, W) instead of (B * H * W,).
    remap: .npy file of the k codes in use, int (k,), which are renumbered 0 to k - 1.
    unknown_index: number of all other codes then: 'random' (0 to k - 1), 'extra' (k) or an integer.
    """

    keeps_float32 = True  # when weights are loaded in 16 bits: rounded entries may have another nearest neighbor

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
        """z: (B, e_dim, H, W) -> (z_q in the shape and dtype of z, loss, (None, None, codes)).

        The other arguments are part of the published signature; only their defaults are supported.
        """
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError("temp, rescale_logits and return_logits are options of Gumbel quantizers, not of this one")
        batch, _, height, width = z.shape
        with torch.autocast(z.device.type, enabled=False):  # distances rounded to 16 bits would select other codes
            latents = rearrange(z, "b c h w -> (b h w) c").float()
            codebook = self.embedding.weight.float()  # (n_e, e_dim)
            codes = self.nearest(latents, codebook)  # (B * H * W,)
            entries = codebook[codes]  # (B * H * W, e_dim)
            commitment = (latents - entries.detach()).square().mean()
            codebook_loss = (entries - latents.detach()).square().mean()
            loss = commitment + self.beta * codebook_loss if self.legacy else self.beta * commitment + codebook_loss
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
        """Remapped codes (B, ...) in the codebook's numbering; 'extra' becomes the first code in use."""
        return super().unmap_to_all(inds.clone())  # taming's method modifies its argument
