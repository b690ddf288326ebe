"""The convolutional networks of the first stage: `Encoder`, `Decoder`, and `Model`, the UNet of DDPM that they descend from.

Widths are `ch * ch_mult[level]`; every level but the lowest halves the picture. Norms are GroupNorm(32, eps=1e-6), not the 1e-5 of
`openaimodel`, and the timestep embedding is sin|cos with divisor half - 1, not cos|sin with divisor half: checkpoints depend on both.

Architecture: DDPM (Ho et al. 2020, arXiv 2006.11239, appendix B); the autoencoders take no time (VQGAN, arXiv 2012.09841).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.first_stage_blocks import (
    AttnBlock,
    Downsample,
    LinAttnBlock,
    Normalize,
    ResnetBlock,
    Upsample,
    get_timestep_embedding,
    make_attn,
    nonlinearity,
)

__all__ = [
    "AttnBlock",
    "Decoder",
    "Downsample",
    "Encoder",
    "LinAttnBlock",
    "Model",
    "Normalize",
    "ResnetBlock",
    "Upsample",
    "get_timestep_embedding",
    "make_attn",
    "nonlinearity",
]


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
        cls,
        *,
        ch_mult: Sequence[int],
        attn_resolutions: Sequence[int],
        use_linear_attn: bool,
        attn_type: str,
        **options: Any,
    ) -> _Plan:
        """The plan for these options. Raises ValueError where the levels do not divide the resolution."""
        attn_type = "linear" if use_linear_attn else attn_type
        plan = cls(ch_mult=tuple(ch_mult), attn_resolutions=tuple(attn_resolutions), attn_type=attn_type, **options)
        factor = 2 ** (len(plan.ch_mult) - 1)
        if plan.resolution % factor:
            raise ValueError(
                f"resolution={plan.resolution}: the {len(plan.ch_mult)} levels of ch_mult need a multiple of {factor}"
            )
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
                ResnetBlock(
                    in_channels=in_channels,
                    out_channels=out_channels,
                    temb_channels=self.temb_channels,
                    dropout=self.dropout,
                )
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
        self.conv_out = nn.Conv2d(
            plan.lowest_width, 2 * z_channels if double_z else z_channels, kernel_size=3, padding=1
        )

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
