"""Networks of the first stages, `Encoder` and `Decoder` (VQGAN, arXiv 2012.09841), and the UNet of DDPM, `Model`.

A level has `ch * ch_mult[level]` channels; every level but the lowest halves the image. Checkpoints depend on two
differences from `openaimodel`: GroupNorm has eps 1e-6, not 1e-5, and the timestep embedding is sin|cos with divisor
half - 1, not cos|sin with divisor half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.types import Dropout, NonNegativeInt, PositiveInt
from ldm.modules.attention import LinearAttention
from ldm.modules.attention import SpatialSelfAttention as AttnBlock
from ldm.modules.diffusionmodules.util import checkpoint, has_global_hooks, is_unchanged
from ldm.published import published_names

ATTENTION_TYPES = ("vanilla", "vanilla-xformers", "linear", "none")
NORM_GROUPS = 32


def get_timestep_embedding(timesteps: Tensor, embedding_dim: int) -> Tensor:
    """Sinusoidal embedding of DDPM, sines first: timesteps (B,) -> (B, embedding_dim) float32.

    Frequencies fall from 1 to 1/10000 inclusive (divisor half - 1). The last column of an odd `embedding_dim` is 0.
    """
    if timesteps.ndim != 1:
        raise ValueError(f"timesteps: expected shape (B,), got {tuple(timesteps.shape)}")
    if embedding_dim < 4:
        raise ValueError(f"embedding_dim={embedding_dim}: must be at least 4 (two frequencies)")
    half = embedding_dim // 2
    indices = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(indices * -(math.log(10000) / (half - 1)))
    angles = timesteps.float()[:, None] * frequencies[None, :]  # (B, half)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, 2 * half)
    return F.pad(embedding, (0, embedding_dim % 2))


def Normalize(in_channels: int, num_groups: int = NORM_GROUPS) -> nn.GroupNorm:
    """GroupNorm with the first stage's eps of 1e-6; float32 under autocast."""
    if in_channels % num_groups:
        raise ValueError(
            f"GroupNorm: {in_channels} channels are not a multiple of {num_groups} groups; change ch, ch_mult or "
            "norm_num_groups"
        )
    return nn.GroupNorm(num_groups=num_groups, num_channels=in_channels, eps=1e-6, affine=True)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling, then a 3x3 convolution if `with_conv`: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Downsample(nn.Module):
    """3x3 convolution of stride 2, or a 2x2 mean without `with_conv`: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.with_conv:
            return F.avg_pool2d(x, kernel_size=2, stride=2)
        # Right and bottom only, as the released weights were trained: symmetric padding shifts by half a pixel.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def silu_of_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """SiLU of a norm's output, in the output's memory if nothing else can read it: maps of images are large.

    A gradient, a hook, or another module in place of the norm may keep the output (nn.Identity returns x itself).
    """
    h = norm(x)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(norm, nn.GroupNorm):
        return F.silu(h)
    return F.silu(h, inplace=is_unchanged(norm) and not has_global_hooks())


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with norms and a shortcut: (B, in, H, W), temb (B, temb_channels) -> (B, out, H, W)."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float,
        temb_channels: int = 512,
        norm_num_groups: int = NORM_GROUPS,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.in_channels, self.out_channels, self.use_conv_shortcut = in_channels, out_channels, conv_shortcut
        self.norm1 = Normalize(in_channels, norm_num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = Normalize(out_channels, norm_num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:
            if conv_shortcut:
                self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
            else:
                self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(silu_of_norm(self.norm1, x))  # (B, out, H, W)
        if temb is not None:
            h = h + self.temb_proj(F.silu(temb))[:, :, None, None]  # (B, out, 1, 1)
        h = self.conv2(self.dropout(silu_of_norm(self.norm2, h)))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class LinAttnBlock(LinearAttention):
    """Linear attention without norm and residual connection, with the constructor of `AttnBlock`."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(dim=in_channels, heads=1, dim_head=in_channels)


def make_attn(in_channels: int, attn_type: str = "vanilla", norm_num_groups: int = NORM_GROUPS) -> nn.Module:
    """Attention layer by name; 'none' is the identity, 'vanilla-xformers' (SD v2's configs) the same as 'vanilla'."""
    if attn_type not in ATTENTION_TYPES:
        raise ValueError(f"attn_type={attn_type!r}: choose one of {', '.join(ATTENTION_TYPES)}")
    if attn_type.startswith("vanilla"):
        return AttnBlock(in_channels, norm_num_groups)
    return LinAttnBlock(in_channels) if attn_type == "linear" else nn.Identity()


class _Level(nn.Module):
    """Residual blocks of one resolution, each with attention if the level has any, then `downsample` or `upsample`."""

    downsample: nn.Module
    upsample: nn.Module

    def __init__(self, block: nn.ModuleList, attn: nn.ModuleList, use_checkpoint: bool) -> None:
        super().__init__()
        self.block, self.attn, self.use_checkpoint = block, attn, use_checkpoint

    def forward(
        self,
        h: Tensor,
        temb: Tensor | None = None,
        skips: list[Tensor] | None = None,
        outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """skips: each block concatenates the last one and removes it. outputs: receives every layer's output."""
        for i, block in enumerate(self.block):
            h = h if skips is None else torch.cat((h, skips.pop()), dim=1)
            h = checkpoint(block, (h, temb), flag=self.use_checkpoint)  # (B, out, H, W)
            if len(self.attn):
                h = checkpoint(self.attn[i], (h,), flag=self.use_checkpoint)
            if outputs is not None:
                outputs.append(h)
        if hasattr(self, "upsample"):
            h = self.upsample(h)
        if hasattr(self, "downsample"):
            h = self.downsample(h)
            if outputs is not None:
                outputs.append(h)
        return h


class _Middle(nn.Module):
    """Layers at the lowest resolution: residual block, attention, residual block."""

    def __init__(self, channels: int, attn_type: str, norm_num_groups: int, use_checkpoint: bool, **block: Any) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        block |= {"in_channels": channels, "norm_num_groups": norm_num_groups}
        self.block_1 = ResnetBlock(**block)
        self.attn_1 = make_attn(channels, attn_type, norm_num_groups)
        self.block_2 = ResnetBlock(**block)

    def forward(self, h: Tensor, temb: Tensor | None = None) -> Tensor:
        h = checkpoint(self.block_1, (h, temb), flag=self.use_checkpoint)
        h = checkpoint(self.attn_1, (h,), flag=self.use_checkpoint)
        return checkpoint(self.block_2, (h, temb), flag=self.use_checkpoint)


class Network(nn.Module):
    """Options that Encoder, Decoder and Model share, and the parts built from them.

    norm_num_groups: groups of every GroupNorm. With fewer than four channels a group, the norm removes
        most of an image's color from the features: networks of 32 or 64 channels keep it with 4 or 8 groups.
    use_checkpoint: recompute the activations of the blocks in the backward pass instead of storing them.
    """

    takes_timesteps = False

    def __init__(
        self,
        *,
        ch: PositiveInt,
        out_ch: PositiveInt,
        ch_mult: Sequence[PositiveInt] = (1, 2, 4, 8),
        num_res_blocks: NonNegativeInt,
        attn_resolutions: Sequence[PositiveInt],
        dropout: Dropout = 0.0,
        resamp_with_conv: bool = True,
        in_channels: PositiveInt,
        resolution: PositiveInt,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        norm_num_groups: PositiveInt = NORM_GROUPS,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if not ch_mult:
            raise ValueError("ch_mult []: expected at least one level")
        factor = 2 ** (len(ch_mult) - 1)
        if resolution % factor:
            raise ValueError(
                f"resolution={resolution}: must be a multiple of {factor} for the {len(ch_mult)} levels of ch_mult"
            )
        if num_res_blocks == 0 and set(ch_mult) != {1}:
            raise ValueError(
                f"num_res_blocks 0 with ch_mult {list(ch_mult)}: only residual blocks change the number of channels; "
                "set num_res_blocks of at least 1, or 1 for each level of ch_mult"
            )
        self.ch, self.in_channels, self.out_ch = ch, in_channels, out_ch
        self.resolution, self.num_resolutions, self.num_res_blocks = resolution, len(ch_mult), num_res_blocks
        self.temb_ch = 4 * ch if self.takes_timesteps else 0
        self._widths = [ch * mult for mult in ch_mult]
        self._lowest_size = resolution // factor
        self._attn_resolutions = tuple(attn_resolutions)
        self._attn_type = "linear" if use_linear_attn else attn_type
        self._resamp_with_conv, self._norm_num_groups = resamp_with_conv, norm_num_groups
        self._use_checkpoint = use_checkpoint
        self._block: dict[str, Any] = {
            "dropout": dropout,
            "temb_channels": self.temb_ch,
            "norm_num_groups": norm_num_groups,
        }

    def _level(self, widths: Sequence[tuple[int, int]], size: int) -> _Level:
        """Residual blocks of these (in, out) widths; with attention if `size` is one of `attn_resolutions`."""
        block, attn = nn.ModuleList(), nn.ModuleList()
        for in_channels, out_channels in widths:
            block.append(ResnetBlock(in_channels=in_channels, out_channels=out_channels, **self._block))
            if size in self._attn_resolutions:
                attn.append(make_attn(out_channels, self._attn_type, self._norm_num_groups))
        return _Level(block, attn, self._use_checkpoint)

    def _down(self) -> nn.ModuleList:
        """Contracting half, from `ch` channels at full size."""
        levels, width, size = nn.ModuleList(), self.ch, self.resolution
        for i_level, out in enumerate(self._widths):
            level = self._level([(width if i == 0 else out, out) for i in range(self.num_res_blocks)], size)
            width = out
            if i_level != self.num_resolutions - 1:
                level.downsample = Downsample(width, self._resamp_with_conv)
                size //= 2
            levels.append(level)
        return levels

    def _middle(self) -> _Middle:
        return _Middle(self._widths[-1], self._attn_type, use_checkpoint=self._use_checkpoint, **self._block)

    def _up(self, with_skips: bool) -> nn.ModuleList:
        """Expanding half, stored under the index of the resolution: `up.0` is the full size and runs last.

        With skips, every block also takes an output of the contracting half, a level's last block the level's input.
        """
        levels: list[_Level] = []
        width, size = self._widths[-1], self._lowest_size
        for i_level, out in reversed(list(enumerate(self._widths))):
            skips = [out] * self.num_res_blocks + [(self.ch, *self._widths)[i_level]]
            level = self._level(
                [((width if i == 0 else out) + (skip if with_skips else 0), out) for i, skip in enumerate(skips)], size
            )
            width = out
            if i_level != 0:
                level.upsample = Upsample(width, self._resamp_with_conv)
                size *= 2
            levels.insert(0, level)
        return nn.ModuleList(levels)


class Encoder(Network):
    """Image to moments or latent: (B, in_channels, H, W) -> (B, 2 * z_channels, H / f, W / f), f = 2 ** (levels - 1).

    Without `double_z` the output has z_channels. `out_ch`, `give_pre_end` and `tanh_out` are options of the Decoder,
    which is built from the same `ddconfig`.
    """

    def __init__(
        self,
        *,
        z_channels: PositiveInt,
        double_z: bool = True,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.conv_in = nn.Conv2d(self.in_channels, self.ch, kernel_size=3, padding=1)
        self.down = self._down()
        self.mid = self._middle()
        self.norm_out = Normalize(self._widths[-1], self._norm_num_groups)
        self.conv_out = nn.Conv2d(
            self._widths[-1], 2 * z_channels if double_z else z_channels, kernel_size=3, padding=1
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, ch, H, W)
        for level in self.down:
            h = level(h)
        h = self.mid(h)  # (B, ch * ch_mult[-1], H/f, W/f)
        return self.conv_out(silu_of_norm(self.norm_out, h))  # (B, 2 * z_channels, H/f, W/f)


class Decoder(Network):
    """Latent to image: (B, z_channels, h, w) -> (B, out_ch, h * f, w * f), about [-1, 1].

    `give_pre_end` stops before the last norm; `tanh_out` bounds the output. `in_channels` and `double_z` are options of
    the Encoder.
    """

    def __init__(
        self,
        *,
        z_channels: PositiveInt,
        double_z: bool = True,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.give_pre_end, self.tanh_out = give_pre_end, tanh_out
        self.conv_in = nn.Conv2d(z_channels, self._widths[-1], kernel_size=3, padding=1)
        self.mid = self._middle()
        self.up = self._up(with_skips=False)
        self.norm_out = Normalize(self._widths[0], self._norm_num_groups)
        self.conv_out = nn.Conv2d(self._widths[0], self.out_ch, kernel_size=3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))  # (B, ch * ch_mult[-1], h, w)
        for level in reversed(self.up):
            h = level(h)  # at last (B, ch * ch_mult[0], H, W)
        if self.give_pre_end:
            return h
        h = self.conv_out(silu_of_norm(self.norm_out, h))  # (B, out_ch, H, W), H = h * f
        return torch.tanh(h) if self.tanh_out else h


class Model(Network):
    """UNet of DDPM (arXiv 2006.11239, appendix B): x (B, in_channels, H, W), t (B,) -> (B, out_ch, H, W).

    `context` (B, C', H, W) is concatenated to x along the channels; `in_channels` counts both. Options: see Network.
    """

    takes_timesteps = True  # as published, the blocks hold their projection even without `use_timestep`

    def __init__(self, *, use_timestep: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.use_timestep = use_timestep
        if use_timestep:
            self.temb = nn.Module()
            self.temb.dense = nn.ModuleList([nn.Linear(self.ch, self.temb_ch), nn.Linear(self.temb_ch, self.temb_ch)])
        self.conv_in = nn.Conv2d(self.in_channels, self.ch, kernel_size=3, padding=1)
        self.down = self._down()
        self.mid = self._middle()
        self.up = self._up(with_skips=True)
        self.norm_out = Normalize(self._widths[0], self._norm_num_groups)
        self.conv_out = nn.Conv2d(self._widths[0], self.out_ch, kernel_size=3, padding=1)

    def forward(self, x: Tensor, t: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        if context is not None:
            x = torch.cat((x, context), dim=1)
        temb = None
        if self.use_timestep:
            if t is None:
                raise ValueError("t: this network was built with use_timestep=True and needs timesteps of shape (B,)")
            first, second = self.temb.get_submodule("dense").children()
            temb = get_timestep_embedding(t, self.ch).to(self.conv_in.weight.dtype)  # (B, ch)
            temb = second(F.silu(first(temb)))  # (B, 4 * ch)
        h = self.conv_in(x)  # (B, ch, H, W)
        skips = [h]
        for level in self.down:
            h = level(h, temb, outputs=skips)
        h = self.mid(h, temb)  # (B, ch * ch_mult[-1], H/f, W/f)
        for level in reversed(self.up):
            h = level(h, temb, skips=skips)
        return self.conv_out(silu_of_norm(self.norm_out, h))  # (B, out_ch, H, W)

    def get_last_layer(self) -> Tensor:
        """Return the weight of the last convolution, (out_ch, ch, 3, 3)."""
        return self.conv_out.weight


__getattr__ = published_names(__name__)
