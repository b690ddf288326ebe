"""Attention layers of the latent diffusion UNet: cross-attention, the spatial transformer, and two light alternatives.

Every softmax attention goes through `attend`, torch's scaled dot-product attention, which keeps logits and softmax in float32
for 16-bit inputs (where the published code upcasts by hand) and never stores the (N, L) matrix where the device has a fused kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import GroupNorm32, checkpoint, normalization, zero_module
from ldm.util import default

NORM_EPS = 1e-6  # the spatial norms here; the UNet's own norms have 1e-5


def Normalize(in_channels: int) -> GroupNorm32:
    """The GroupNorm of spatial transformers and first stages: 32 groups, eps 1e-6."""
    return normalization(in_channels, eps=NORM_EPS)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    q: (B, H, N, D), k and v: (B, H, L, D), mask: bool (B, L), True where a key takes part -> (B, H, N, D).
    """
    bias = None
    if mask is not None:
        # Finite, so that a row without any key averages all values, as in the published code, instead of giving NaN;
        # half of the lowest value, so that adding a logit cannot overflow.
        lowest = torch.finfo(q.dtype).min / 2
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, lowest)[
            :, None, None, :
        ]  # (B, 1, 1, L)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class GEGLU(nn.Module):
    """Gated linear unit with a GELU gate (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """The two-layer network of a transformer block: (..., dim) -> (..., dim_out), `mult * dim` wide in between."""

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner_dim = int(dim * mult)
        project_in = GEGLU(dim, inner_dim) if glu else nn.Sequential(nn.Linear(dim, inner_dim), nn.GELU())
        self.net = nn.Sequential(project_in, nn.Dropout(dropout), nn.Linear(inner_dim, default(dim_out, dim)))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention of a sequence on a context, or on itself where no context is given."""

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner_dim = dim_head * heads
        context_dim = default(context_dim, query_dim)
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x: (B, N, query_dim), context: (B, L, context_dim) -> (B, N, query_dim).

        mask: bool (B, L), or (B, ...) with L elements in all, True where a key takes part.
        """
        context = x if context is None else context
        if mask is not None:
            mask = self._key_mask(mask, context)
        q, k, v = (
            rearrange(y, "b n (h d) -> b h n d", h=self.heads)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = attend(q, k, v, mask)  # (B, H, N, D)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))

    @staticmethod
    def _key_mask(mask: Tensor, context: Tensor) -> Tensor:
        flat = mask.flatten(1)
        if mask.dtype != torch.bool or flat.shape != context.shape[:2]:
            raise ValueError(
                f"attention mask {tuple(mask.shape)} {mask.dtype}: expected torch.bool with one element for each of the "
                f"(batch, length) = {tuple(context.shape[:2])} keys, True where a key takes part"
            )
        return flat


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and a gated feed-forward layer, each behind a LayerNorm and a residual connection.

    `disable_self_attn` turns the first attention to the context too; without a context both attend to the sequence itself.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
        disable_self_attn: bool = False,
    ) -> None:
        super().__init__()
        self.disable_self_attn = disable_self_attn
        self.checkpoint = checkpoint
        first_context = context_dim if disable_self_attn else None
        self.attn1 = CrossAttention(dim, first_context, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = CrossAttention(dim, context_dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: (B, N, dim), context: (B, L, context_dim) -> (B, N, dim)."""
        return checkpoint(self._forward, (x, context), self.parameters(), self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.disable_self_attn else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, as tokens, with a residual connection around all of them.

    `context_dim` is one width, or one for each of the `depth` blocks. `use_linear` (Stable Diffusion v2) projects the tokens by
    linear layers instead of 1x1 convolutions: the same numbers, other weight shapes. The output starts as the input (zero projection).
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | Sequence[int] | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        use_checkpoint: bool = True,
    ) -> None:
        super().__init__()
        context_dims = per_block(context_dim, depth)
        inner_dim = n_heads * d_head
        self.in_channels = in_channels
        self.use_linear = use_linear
        self.norm = Normalize(in_channels)
        self.proj_in = (
            nn.Linear(in_channels, inner_dim) if use_linear else nn.Conv2d(in_channels, inner_dim, kernel_size=1)
        )
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner_dim,
                n_heads,
                d_head,
                dropout=dropout,
                context_dim=width,
                checkpoint=use_checkpoint,
                disable_self_attn=disable_self_attn,
            )
            for width in context_dims
        )
        self.proj_out = zero_module(
            nn.Linear(inner_dim, in_channels) if use_linear else nn.Conv2d(inner_dim, in_channels, kernel_size=1)
        )

    def forward(self, x: Tensor, context: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """x: (B, C, H, W), context: (B, L, context_dim), or one tensor for each block -> (B, C, H, W)."""
        contexts = self._contexts(context)
        height = x.shape[2]
        h = self.norm(x)  # (B, C, H, W)
        if not self.use_linear:
            h = self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c").contiguous()  # (B, HW, C); a view where x is channels_last
        if self.use_linear:
            h = self.proj_in(h)
        for block, block_context in zip(self.transformer_blocks, contexts, strict=True):
            h = block(h, block_context)
        if self.use_linear:
            h = self.proj_out(h)
        h = rearrange(h, "b (h w) c -> b c h w", h=height)
        if not self.use_linear:
            h = self.proj_out(h)
        return x + h  # x first: its memory format is the result's

    def _contexts(self, context: Tensor | Sequence[Tensor] | None) -> list[Tensor | None]:
        blocks = len(self.transformer_blocks)
        if context is None or torch.is_tensor(context):
            return [context] * blocks
        if len(context) not in (1, blocks):
            raise ValueError(
                f"{len(context)} contexts for {blocks} transformer blocks: give one tensor, or one for each block"
            )
        return list(context) * (blocks // len(context))


class LinearAttention(nn.Module):
    """Attention in linear time: the softmax goes over the keys alone (https://arxiv.org/abs/1812.01243)."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32) -> None:
        super().__init__()
        self.heads = heads
        hidden_dim = dim_head * heads
        self.to_qkv = nn.Conv2d(dim, hidden_dim * 3, 1, bias=False)
        self.to_out = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        height = x.shape[2]
        q, k, v = rearrange(self.to_qkv(x), "b (qkv heads d) h w -> qkv b heads d (h w)", qkv=3, heads=self.heads)
        context = k.softmax(dim=-1) @ v.transpose(-1, -2)  # (B, heads, D, E)
        out = context.transpose(-1, -2) @ q  # (B, heads, E, HW)
        return self.to_out(rearrange(out, "b heads e (h w) -> b (heads e) h w", h=height))


class SpatialSelfAttention(nn.Module):
    """Single-head self-attention over the pixels of a feature map, with a residual connection."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels)
        self.q = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.k = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.v = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        h = self.norm(x)
        q, k, v = (rearrange(conv(h), "b c h w -> b 1 (h w) c") for conv in (self.q, self.k, self.v))
        h = rearrange(attend(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


def per_block(context_dim: int | Sequence[int] | None, depth: int) -> list[int | None]:
    """The context width of each of `depth` transformer blocks, from one width or one for each block."""
    if context_dim is None or isinstance(context_dim, int):
        return [context_dim] * depth
    widths = [int(width) for width in context_dim]
    if len(widths) not in (1, depth):
        raise ValueError(
            f"context_dim={widths} has {len(widths)} widths for transformer_depth={depth}: give one, or one for each block"
        )
    return widths * (depth // len(widths))
