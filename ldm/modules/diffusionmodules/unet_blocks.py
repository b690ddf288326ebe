"""The layers that the UNets of `openaimodel.py` are put together from (ADM, https://arxiv.org/abs/2105.05233)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer, attend
from ldm.modules.diffusionmodules.util import avg_pool_nd, checkpoint, conv_nd, linear, normalization, zero_module


class TimestepBlock(nn.Module, ABC):
    """A layer whose forward takes a timestep embedding beside its input."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (B, C, ...), emb: (B, E) -> (B, C', ...)."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that hands the timestep embedding and the context to those of its layers that take them."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by two, with a convolution where `use_conv` is true; for dims=3 the first axis keeps its size."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, self.channels, self.out_channels, 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, ..., H, W) -> (B, C', ..., 2H, 2W)."""
        _check_channels(self, x)
        x = F.interpolate(x, scale_factor=(1, 2, 2) if self.dims == 3 else 2, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Downsampling by two, by a strided convolution or an average pool; for dims=3 the first axis keeps its size."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, self.channels, self.out_channels, 3, stride=stride, padding=padding)
        elif self.out_channels != channels:
            raise ValueError(
                f"Downsample without a convolution keeps its {channels} channels; got out_channels={out_channels}"
            )
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, ..., H, W) -> (B, C', ..., H/2, W/2)."""
        _check_channels(self, x)
        return self.op(x)


class ResBlock(TimestepBlock):
    """A residual block that is shifted, or scaled and shifted, by the timestep embedding, and may resample by two.

    The skip connection is a 1x1 convolution where the number of channels changes, 3x3 with `use_conv`.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        if up and down:
            raise ValueError("ResBlock: up=True and down=True exclude each other")
        self.channels = channels
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.updown = up or down

        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, self.out_channels, 3, padding=1)
        )
        resample = Upsample if up else Downsample
        self.h_upd = resample(channels, False, dims) if self.updown else nn.Identity()
        self.x_upd = resample(channels, False, dims) if self.updown else nn.Identity()
        self.emb_layers = nn.Sequential(
            nn.SiLU(), linear(emb_channels, (2 if use_scale_shift_norm else 1) * self.out_channels)
        )
        self.out_layers = nn.Sequential(
            normalization(self.out_channels),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, self.out_channels, self.out_channels, 3, padding=1)),
        )
        if self.out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (B, C, ...), emb: (B, E) -> (B, C', ...)."""
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = act(norm(x))
        if self.updown:
            h, x = self.h_upd(h), self.x_upd(x)
        h = conv(h)  # (B, C', ...)
        emb = self.emb_layers(emb)  # (B, C') or (B, 2C')
        emb = emb.view(*emb.shape, *[1] * (h.ndim - 2))
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            for layer in self.out_layers[1:]:
                h = layer(h)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map, with a residual connection and a zero-initialised projection.

    Where `num_head_channels` is not -1 it decides the number of heads. The 3C channels of `qkv` are grouped by head first
    (head, then q, k, v), as in the released models; `use_new_attention_order` groups them by q, k, v first.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.num_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        if (
            self.num_heads < 1
            or channels % self.num_heads
            or (num_head_channels != -1 and channels % num_head_channels)
        ):
            raise ValueError(
                f"{channels} channels cannot be split into heads with num_heads={num_heads}, num_head_channels={num_head_channels}; "
                f"choose one that divides {channels} and leave the other at -1"
            )
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, ...) -> (B, C, ...)."""
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        h = self.qkv(self.norm(x).flatten(2))  # (B, 3C, N)
        h = self.proj_out(qkv_attention(h, self.num_heads, by_head=not self.use_new_attention_order))  # (B, C, N)
        return x + h.view(x.shape)


class AttentionPool2d(nn.Module):
    """A feature map's average, as the one query of an attention over all its positions (CLIP, arXiv 2103.00020)."""

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ) -> None:
        super().__init__()
        if num_heads_channels < 1 or embed_dim % num_heads_channels:
            raise ValueError(
                f"AttentionPool2d: {embed_dim} channels are no multiple of num_head_channels={num_heads_channels}"
            )
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.num_heads = embed_dim // num_heads_channels

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, S, S) -> (B, output_dim)."""
        x = x.flatten(2)  # (B, C, S*S)
        if x.shape[2] + 1 != self.positional_embedding.shape[1]:
            raise ValueError(
                f"attention pool: {x.shape[2]} positions arrived, it was built for {self.positional_embedding.shape[1] - 1}; "
                "inputs must be image_size x image_size"
            )
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1) + self.positional_embedding.to(x.dtype)
        x = qkv_attention(self.qkv_proj(x), self.num_heads, by_head=False)
        return self.c_proj(x)[:, :, 0]


def qkv_attention(qkv: Tensor, num_heads: int, by_head: bool) -> Tensor:
    """Self-attention of channel-first sequences.

    qkv: (B, 3C, N), its channels ordered (head, qkv, c) where `by_head` (the legacy order), else (qkv, head, c) -> (B, C, N).
    """
    batch, width, length = qkv.shape
    if by_head:
        q, k, v = qkv.view(batch, num_heads, 3, -1, length).transpose(-1, -2).unbind(2)  # (B, H, N, D)
    else:
        q, k, v = qkv.view(batch, 3, num_heads, -1, length).transpose(-1, -2).unbind(1)
    return attend(q, k, v).transpose(-1, -2).reshape(batch, width // 3, length)


def _check_channels(layer: Upsample | Downsample, x: Tensor) -> None:
    if x.shape[1] != layer.channels:
        raise ValueError(f"{type(layer).__name__} for {layer.channels} channels got {tuple(x.shape)}")
