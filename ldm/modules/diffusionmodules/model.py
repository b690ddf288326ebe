"""The convolutional networks of the first stage: `Encoder`, `Decoder`, and `Model`, the UNet of DDPM that they descend from.

Widths are `ch * ch_mult[level]`; every level but the lowest halves the picture. Norms are GroupNorm(32, eps=1e-6), not the 1e-5 of
`openaimodel`, and the timestep embedding is sin|cos with divisor half - 1, not cos|sin with divisor half: checkpoints depend on both.

Architecture: DDPM (Ho et al. 2020, arXiv 2006.11239, appendix B); the autoencoders take no time (VQGAN, arXiv 2012.09841).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=timesteps.device) * -(math.log(10000) / (half - 1)))
    angles = timesteps.float()[:, None] * frequencies[None, :]  # (B, half)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, 2 * half)
    return F.pad(embedding, (0, embedding_dim % 2))


def nonlinearity(x: Tensor) -> Tensor:
    """SiLU (swish), the activation of every block here."""
    return F.silu(x)


def Normalize(in_channels: int, num_groups: int = NORM_GROUPS) -> nn.GroupNorm:
    """GroupNorm with the first stage's eps of 1e-6. Raises ValueError where `num_groups` does not divide the width."""
    if in_channels % num_groups:
        raise ValueError(f"GroupNorm: {in_channels} channels are not a multiple of {num_groups} groups; change ch or ch_mult")
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
        self, *, in_channels: int, out_channels: int | None = None, conv_shortcut: bool = False, dropout: float, temb_channels: int = 512
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


class _Level(nn.Module):
    """One resolution of a network, a holder of published names: `block`, `attn`, and `downsample` or `upsample` where there is one."""

    def __init__(self, block: nn.ModuleList, attn: nn.ModuleList) -> None:
        super().__init__()
        self.block = block
        self.attn = attn

    def step(self, index: int, h: Tensor, temb: Tensor | None) -> Tensor:
        h = self.block[index](h, temb)
        return self.attn[index](h) if len(self.attn) else h


class _Middle(nn.Module):
    """The lowest resolution: residual block, attention, residual block."""

    def __init__(self, channels: int, attn_type: str, dropout: float, temb_channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(in_channels=channels, temb_channels=temb_channels, dropout=dropout)
        self.attn_1 = make_attn(channels, attn_type)
        self.block_2 = ResnetBlock(in_channels=channels, temb_channels=temb_channels, dropout=dropout)

    def forward(self, h: Tensor, temb: Tensor | None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h, temb)), temb)


class _Plan(NamedTuple):
    """The options that every level of a network shares, and the parts made from them."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    resolution: int
    resamp_with_conv: bool
    attn_type: str
    dropout: float
    temb_channels: int

    @classmethod
    def checked(
        cls, *, ch_mult: Sequence[int], attn_resolutions: Sequence[int], use_linear_attn: bool, attn_type: str, **options: Any
    ) -> _Plan:
        """The plan for these options. Raises ValueError where the levels do not divide the resolution."""
        attn_type = "linear" if use_linear_attn else attn_type
        plan = cls(ch_mult=tuple(ch_mult), attn_resolutions=tuple(attn_resolutions), attn_type=attn_type, **options)
        factor = 2 ** (len(plan.ch_mult) - 1)
        if plan.resolution % factor:
            raise ValueError(f"resolution={plan.resolution}: the {len(plan.ch_mult)} levels of ch_mult need a multiple of {factor}")
        return plan

    @property
    def lowest_width(self) -> int:
        return self.ch * self.ch_mult[-1]

    @property
    def lowest_size(self) -> int:
        return self.resolution // 2 ** (len(self.ch_mult) - 1)

    def level(self, widths: Sequence[tuple[int, int]], size: int) -> _Level:
        """Residual blocks of the given (in, out) widths, each followed by attention where `size` is one of `attn_resolutions`."""
        block, attn = nn.ModuleList(), nn.ModuleList()
        for in_channels, out_channels in widths:
            block.append(
                ResnetBlock(in_channels=in_channels, out_channels=out_channels, temb_channels=self.temb_channels, dropout=self.dropout)
            )
            if size in self.attn_resolutions:
                attn.append(make_attn(out_channels, self.attn_type))
        return _Level(block, attn)

    def down(self) -> nn.ModuleList:
        """The contracting half, from `ch` channels at full size."""
        levels, width, size = nn.ModuleList(), self.ch, self.resolution
        for i_level, mult in enumerate(self.ch_mult):
            out = self.ch * mult
            level = self.level([(width if i == 0 else out, out) for i in range(self.num_res_blocks)], size)
            width = out
            if i_level != len(self.ch_mult) - 1:
                level.downsample = Downsample(width, self.resamp_with_conv)
                size //= 2
            levels.append(level)
        return levels

    def middle(self) -> _Middle:
        return _Middle(self.lowest_width, self.attn_type, self.dropout, self.temb_channels)

    def up(self, with_skips: bool) -> nn.ModuleList:
        """The expanding half, stored under the index of the resolution: `up.0` is the full size and runs last.

        With skips every block also reads one map from the way down; a level's last block reads what the level was given there.
        """
        levels, width, size = [], self.lowest_width, self.lowest_size
        for i_level, mult in reversed(list(enumerate(self.ch_mult))):
            out = self.ch * mult
            skips = [out] * self.num_res_blocks + [self.ch * (1, *self.ch_mult)[i_level]]
            widths = [((width if i == 0 else out) + (skip if with_skips else 0), out) for i, skip in enumerate(skips)]
            level = self.level(widths, size)
            width = out
            if i_level != 0:
                level.upsample = Upsample(width, self.resamp_with_conv)
                size *= 2
            levels.insert(0, level)
        return nn.ModuleList(levels)


class Encoder(nn.Module):
    """Picture to latent: (B, in_channels, H, W) -> (B, 2 * z_channels if double_z else z_channels, H / f, W / f), f = 2 ** (levels - 1).

    `ddconfig` is shared with `Decoder`, whose own options (`out_ch`, `give_pre_end`, `tanh_out`) are accepted here and mean nothing.
    """

    def __init__(
        self, *, ch: int, out_ch: int, ch_mult: Sequence[int] = (1, 2, 4, 8), num_res_blocks: int, attn_resolutions: Sequence[int],
        dropout: float = 0.0, resamp_with_conv: bool = True, in_channels: int, resolution: int, z_channels: int, double_z: bool = True,
        use_linear_attn: bool = False, attn_type: str = "vanilla", give_pre_end: bool = False, tanh_out: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        plan = _Plan.checked(
            ch=ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, attn_resolutions=attn_resolutions, resolution=resolution,
            resamp_with_conv=resamp_with_conv, use_linear_attn=use_linear_attn, attn_type=attn_type, dropout=dropout, temb_channels=0,
        )  # fmt: skip
        self.ch = ch
        self.num_resolutions = len(ch_mult)
        self.num_res_blocks = num_res_blocks
        self.resolution = resolution
        self.in_channels = in_channels
        self.conv_in = nn.Conv2d(in_channels, ch, kernel_size=3, padding=1)
        self.down = plan.down()
        self.mid = plan.middle()
        self.norm_out = Normalize(plan.lowest_width)
        self.conv_out = nn.Conv2d(plan.lowest_width, 2 * z_channels if double_z else z_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, ch, H, W)
        for i_level, level in enumerate(self.down):
            for i_block in range(self.num_res_blocks):
                h = level.step(i_block, h, None)
            if i_level != self.num_resolutions - 1:
                h = level.downsample(h)
        h = self.mid(h, None)  # (B, ch * ch_mult[-1], H/f, W/f)
        return self.conv_out(nonlinearity(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent to picture: (B, z_channels, h, w) -> (B, out_ch, h * f, w * f), about [-1, 1].

    `give_pre_end` stops before the last norm; `tanh_out` bounds the output. `in_channels` and `double_z` are the Encoder's.
    """

    def __init__(
        self, *, ch: int, out_ch: int, ch_mult: Sequence[int] = (1, 2, 4, 8), num_res_blocks: int, attn_resolutions: Sequence[int],
        dropout: float = 0.0, resamp_with_conv: bool = True, in_channels: int, resolution: int, z_channels: int, double_z: bool = True,
        use_linear_attn: bool = False, attn_type: str = "vanilla", give_pre_end: bool = False, tanh_out: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        plan = _Plan.checked(
            ch=ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, attn_resolutions=attn_resolutions, resolution=resolution,
            resamp_with_conv=resamp_with_conv, use_linear_attn=use_linear_attn, attn_type=attn_type, dropout=dropout, temb_channels=0,
        )  # fmt: skip
        self.ch = ch
        self.num_resolutions = len(ch_mult)
        self.num_res_blocks = num_res_blocks
        self.resolution = resolution
        self.in_channels = in_channels
        self.give_pre_end = give_pre_end
        self.tanh_out = tanh_out
        self.z_shape = (1, z_channels, plan.lowest_size, plan.lowest_size)
        self.conv_in = nn.Conv2d(z_channels, plan.lowest_width, kernel_size=3, padding=1)
        self.mid = plan.middle()
        self.up = plan.up(with_skips=False)
        self.norm_out = Normalize(ch * ch_mult[0])
        self.conv_out = nn.Conv2d(ch * ch_mult[0], out_ch, kernel_size=3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z), None)  # (B, ch * ch_mult[-1], h, w)
        for i_level in reversed(range(self.num_resolutions)):
            level = self.up[i_level]
            for i_block in range(self.num_res_blocks + 1):
                h = level.step(i_block, h, None)
            if i_level != 0:
                h = level.upsample(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(nonlinearity(self.norm_out(h)))  # (B, out_ch, H, W)
        return torch.tanh(h) if self.tanh_out else h


class Model(nn.Module):
    """The UNet of DDPM: x (B, in_channels, H, W), t (B,) -> (B, out_ch, H, W).

    `context` (B, C', H, W) is joined to x along the channels; `in_channels` counts both.
    """

    def __init__(
        self, *, ch: int, out_ch: int, ch_mult: Sequence[int] = (1, 2, 4, 8), num_res_blocks: int, attn_resolutions: Sequence[int],
        dropout: float = 0.0, resamp_with_conv: bool = True, in_channels: int, resolution: int, use_timestep: bool = True,
        use_linear_attn: bool = False, attn_type: str = "vanilla",
    ) -> None:  # fmt: skip
        super().__init__()
        self.temb_ch = 4 * ch
        plan = _Plan.checked(
            ch=ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, attn_resolutions=attn_resolutions, resolution=resolution,
            resamp_with_conv=resamp_with_conv, use_linear_attn=use_linear_attn, attn_type=attn_type, dropout=dropout,
            temb_channels=self.temb_ch,  # the blocks hold their projection even where no timestep is used, as published
        )  # fmt: skip
        self.ch = ch
        self.num_resolutions = len(ch_mult)
        self.num_res_blocks = num_res_blocks
        self.resolution = resolution
        self.in_channels = in_channels
        self.use_timestep = use_timestep
        if use_timestep:
            self.temb = nn.Module()
            self.temb.dense = nn.ModuleList([nn.Linear(ch, self.temb_ch), nn.Linear(self.temb_ch, self.temb_ch)])
        self.conv_in = nn.Conv2d(in_channels, ch, kernel_size=3, padding=1)
        self.down = plan.down()
        self.mid = plan.middle()
        self.up = plan.up(with_skips=True)
        self.norm_out = Normalize(ch * ch_mult[0])
        self.conv_out = nn.Conv2d(ch * ch_mult[0], out_ch, kernel_size=3, padding=1)

    def forward(self, x: Tensor, t: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        if context is not None:
            x = torch.cat((x, context), dim=1)
        temb = None
        if self.use_timestep:
            if t is None:
                raise ValueError("t: this network was built with use_timestep=True and needs timesteps of shape (B,)")
            temb = get_timestep_embedding(t, self.ch).to(self.temb.dense[0].weight.dtype)  # (B, ch)
            temb = self.temb.dense[1](nonlinearity(self.temb.dense[0](temb)))  # (B, 4 * ch)
        hs = [self.conv_in(x)]
        for i_level, level in enumerate(self.down):
            for i_block in range(self.num_res_blocks):
                hs.append(level.step(i_block, hs[-1], temb))
            if i_level != self.num_resolutions - 1:
                hs.append(level.downsample(hs[-1]))
        h = self.mid(hs[-1], temb)
        for i_level in reversed(range(self.num_resolutions)):
            level = self.up[i_level]
            for i_block in range(self.num_res_blocks + 1):
                h = level.step(i_block, torch.cat((h, hs.pop()), dim=1), temb)
            if i_level != 0:
                h = level.upsample(h)
        return self.conv_out(nonlinearity(self.norm_out(h)))

    def get_last_layer(self) -> nn.Parameter:
        """The weight of the last convolution."""
        return self.conv_out.weight
