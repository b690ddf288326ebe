"""Attention layers: cross-attention and the spatial transformer of the UNet, linear and single-head self-attention.

Every softmax attention goes through `attend`: torch's scaled dot-product attention keeps logits and softmax in float32
for 16-bit inputs (the published code upcasts by hand), and its fused kernels never store the (N, L) matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import (
    NORM_GROUPS,
    GroupNorm32,
    checkpoint,
    normalization,
    repeat_batch,
    zero_module,
)
from ldm.modules.run_constants import project
from ldm.published import published_names
from ldm.util import default

T = TypeVar("T")


class ContextBlock(nn.Module):
    """Base of the UNet layers that take the context: `forward(x, context)`, or `forward(x, emb, context)` of a layer
    that is also a `TimestepBlock`. `TimestepEmbedSequential` passes the context to no other layer.
    """


def Normalize(in_channels: int, num_groups: int = NORM_GROUPS) -> GroupNorm32:
    """GroupNorm of the spatial layers: eps 1e-6 (the UNet's own norms have 1e-5)."""
    return normalization(in_channels, eps=1e-6, num_groups=num_groups)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v; `scale` is 1 / sqrt(D) by default.

    q: (B, H, N, D), k and v: (B, H, L, D), mask: bool (B, L), True for visible keys -> (B, H, N, D).
    causal: later keys are not visible to a query. As published, a query without a visible key averages all values.
    """
    visible = None
    if mask is not None:
        visible = mask[:, None, None, :]  # (B, 1, 1, L)
        if causal:
            visible = visible & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        # Equal logits average all values; the dtype's lowest value, as published, could overflow when added to logits.
        sees_none = ~visible.any(dim=-1, keepdim=True)  # (B, 1, 1 or N, 1)
        q, visible = q.masked_fill(sees_none, 0.0), visible | sees_none
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, dropout_p=dropout, is_causal=causal and mask is None, scale=scale
    )


class GEGLU(nn.Module):
    """Gated linear unit with a GELU gate (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)  # (..., dim_out) each
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Two-layer network of a transformer block: (..., dim) -> (..., dim_out), with `mult * dim` hidden channels."""

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
    """Multi-head attention of a sequence to a context; without a context, self-attention."""

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner_dim = dim_head * heads
        context_dim = default(context_dim, query_dim)
        self.heads = heads
        self.scale = dim_head**-0.5
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x: (B, N, query_dim), context: (B, L, context_dim) -> (B, N, query_dim).

        mask: bool (B, L), or (B, ...) with L elements per sample; True for visible keys.
        """
        context = x if context is None else context
        if mask is not None:
            if mask.dtype != torch.bool or mask.flatten(1).shape != context.shape[:2]:
                raise ValueError(
                    f"attention mask {tuple(mask.shape)} {mask.dtype}: expected torch.bool with one element per key, "
                    f"(batch, length) = {tuple(context.shape[:2])}, True for visible keys"
                )
            mask = mask.flatten(1)
        q, k, v = (
            rearrange(y, "b n (h d) -> b h n d", h=self.heads)
            for y in (self.to_q(x), project(self.to_k, context), project(self.to_v, context))
        )  # (B, heads, N or L, dim_head)
        return self.to_out(rearrange(attend(q, k, v, mask, scale=self.scale), "b h n d -> b n (h d)"))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and a gated feed-forward layer, each with a LayerNorm and a residual connection.

    With `disable_self_attn` both attend to the context. Without a context both are self-attention.
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
        self.disable_self_attn, self.checkpoint = disable_self_attn, checkpoint
        first_context = context_dim if disable_self_attn else None
        self.attn1 = CrossAttention(dim, first_context, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = CrossAttention(dim, context_dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: (B, N, dim), context: (B, L, context_dim) -> (B, N, dim).

        A context of a multiple of B repeats x, after the self-attention: -> (size of the context, N, dim).
        """
        return checkpoint(self._forward, (x, context), self.parameters(), self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        # By keyword: the forward methods that research code puts in place have other arguments before the context.
        if context is not None and self.disable_self_attn:
            x = repeat_batch(x, context.shape[0])
        x = x + self.attn1(self.norm1(x), context=context if self.disable_self_attn else None)
        if context is not None:
            x = repeat_batch(x, context.shape[0])
        x = x + self.attn2(self.norm2(x), context=context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(ContextBlock):
    """Transformer blocks over the pixels of a feature map, with a residual connection; starts as the identity.

    context_dim: one width, or one for each of the `depth` blocks.
    use_linear: project by linear layers instead of 1x1 convolutions (Stable Diffusion v2); only weight shapes differ.
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
        inner_dim = n_heads * d_head
        self.in_channels, self.use_linear = in_channels, use_linear
        self.norm = Normalize(in_channels)
        self.proj_in = nn.Linear(in_channels, inner_dim) if use_linear else nn.Conv2d(in_channels, inner_dim, 1)
        widths = [context_dim] if context_dim is None or isinstance(context_dim, int) else context_dim
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
            for width in _one_per_block(widths, depth, "context_dim")
        )
        self.proj_out = zero_module(
            nn.Linear(inner_dim, in_channels) if use_linear else nn.Conv2d(inner_dim, in_channels, 1)
        )

    def forward(self, x: Tensor, context: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """x: (B, C, H, W), context: (B, L, context_dim), or one tensor for each block -> (B, C, H, W).

        A context of a multiple of B repeats x: -> (size of the context, C, H, W).
        """
        given = [context] if context is None or isinstance(context, Tensor) else context
        contexts = _one_per_block(given, len(self.transformer_blocks), "context")
        h = self.norm(x)  # (B, C, H, W)
        if not self.use_linear:
            h = self.proj_in(h)
        h = rearrange(h, "b c h w -> b (h w) c").contiguous()  # (B, HW, C or inner_dim)
        if self.use_linear:
            h = self.proj_in(h)
        for block, block_context in zip(self.transformer_blocks, contexts, strict=True):
            h = block(h, context=block_context)  # (B, HW, inner_dim)
        if self.use_linear:
            h = self.proj_out(h)
        h = rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])
        if not self.use_linear:
            h = self.proj_out(h)
        return repeat_batch(x, h.shape[0]) + h  # x first: the sum has its memory format


def _one_per_block(values: Sequence[T], blocks: int, name: str) -> list[T]:
    if len(values) not in (1, blocks):
        raise ValueError(
            f"{name}: {len(values)} values for {blocks} transformer blocks (transformer_depth): pass 1 or {blocks}"
        )
    return list(values) * (blocks // len(values))


class LinearAttention(nn.Module):
    """Attention in linear time: the softmax runs over the keys only (https://arxiv.org/abs/1812.01243)."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32) -> None:
        super().__init__()
        self.heads = heads
        hidden_dim = dim_head * heads
        self.to_qkv = nn.Conv2d(dim, hidden_dim * 3, 1, bias=False)
        self.to_out = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        q, k, v = rearrange(self.to_qkv(x), "b (qkv heads d) h w -> qkv b heads d (h w)", qkv=3, heads=self.heads)
        context = k.softmax(dim=-1) @ v.transpose(-1, -2)  # (B, heads, D, E)
        out = context.transpose(-1, -2) @ q  # (B, heads, E, HW)
        return self.to_out(rearrange(out, "b heads e (h w) -> b (heads e) h w", h=x.shape[2]))


class SpatialSelfAttention(nn.Module):
    """Single-head self-attention over the pixels of a feature map, with a residual connection."""

    def __init__(self, in_channels: int, norm_num_groups: int = NORM_GROUPS) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels, norm_num_groups)
        self.q = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.k = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.v = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        h = self.norm(x)
        q, k, v = (rearrange(project(h), "b c h w -> b 1 (h w) c") for project in (self.q, self.k, self.v))  # 1 head
        h = rearrange(attend(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


__getattr__ = published_names(__name__)
