"""Blocks of the first stage's networks in `model`: resnet, attention, up- and downsampling, and DDPM's timestep embedding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.attention import LinearAttention

ATTENTION_TYPES = ("vanilla", "vanilla-xformers", "linear", "none")
NORM_GROUPS = 32


def get_timestep_embedding(timesteps: Tensor, embedding_dim: int) -> Tensor:
    """Sinusoidal features of DDPM: timesteps (B,) -> (B, embedding_dim) float32, all sines and then all cosines; an odd last column is 0.

    Frequencies fall from 1 to 1/10000 inclusive (divisor half - 1).
    """
    if timesteps.ndim != 1:
        raise ValueError(f"timesteps: expected shape (B,), got {tuple(timesteps.shape)}")
    if embedding_dim < 4:
        raise ValueError(f"embedding_dim={embedding_dim}: at least 4 (two frequencies) are needed")
    half = embedding_dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=timesteps.device) * -(math.log(10000) / (half - 1))
    )
    angles = timesteps.float()[:, None] * frequencies[None, :]  # (B, half)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, 2 * half)
    return F.pad(embedding, (0, embedding_dim % 2))


def nonlinearity(x: Tensor) -> Tensor:
    """SiLU (swish), the activation of every block here."""
    return F.silu(x)


def Normalize(in_channels: int, num_groups: int = NORM_GROUPS) -> nn.GroupNorm:
    """GroupNorm with the first stage's eps of 1e-6. Raises ValueError where `num_groups` does not divide the width."""
    if in_channels % num_groups:
        raise ValueError(
            f"GroupNorm: {in_channels} channels are not a multiple of {num_groups} groups; change ch or ch_mult"
        )
    return nn.GroupNorm(num_groups=num_groups, num_channels=in_channels, eps=1e-6, affine=True)


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): nearest neighbor, then a 3x3 convolution unless `with_conv` is false."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2): a 3x3 convolution of stride 2, padded at the right and the bottom only, or a 2x2 mean."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.with_conv:
            return F.avg_pool2d(x, kernel_size=2, stride=2)
        # Asymmetric, as released weights were trained: symmetric padding would shift every feature map by half a pixel.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResnetBlock(nn.Module):
    """Two normalized 3x3 convolutions beside a shortcut; x (B, in, H, W), temb (B, temb_channels) or None -> (B, out, H, W)."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float,
        temb_channels: int = 512,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.use_conv_shortcut = conv_shortcut
        self.norm1 = Normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = Normalize(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:
            if conv_shortcut:
                self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
            else:
                self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(nonlinearity(self.norm1(x)))  # (B, out, H, W)
        if temb is not None:
            h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    """Self-attention of one head as wide as the feature map, added to its input: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels)
        self.q = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.k = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.v = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(project(h), "b c h w -> b 1 (h w) c") for project in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H*W, C), scaled by C ** -0.5
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class LinAttnBlock(LinearAttention):
    """Linear attention (no norm, no residual of its own) under the argument that the other blocks here take."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(dim=in_channels, heads=1, dim_head=in_channels)


def make_attn(in_channels: int, attn_type: str = "vanilla") -> nn.Module:
    """The attention block that `attn_type` names: 'vanilla', 'linear' or 'none' (a pass-through without parameters).

    'vanilla-xformers' of Stable Diffusion v2's configs is the same attention by other means.
    """
    if attn_type not in ATTENTION_TYPES:
        raise ValueError(f"attn_type={attn_type!r}: choose one of {', '.join(ATTENTION_TYPES)}")
    if attn_type.startswith("vanilla"):
        return AttnBlock(in_channels)
    return LinAttnBlock(in_channels) if attn_type == "linear" else nn.Identity()
