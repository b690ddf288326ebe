"""The contracting half of the UNets of `openaimodel.py`, and the factory that makes their layers from the constructors' options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.unet_blocks import (
    AttentionBlock,
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
)
from ldm.modules.diffusionmodules.util import conv_nd, linear, timestep_embedding

T = TypeVar("T")


@dataclass(frozen=True)
class LayerFactory:
    """Makes a UNet's layers from the options that all of them share; the fields are the constructor's arguments of the same names."""

    emb_channels: int
    dropout: float
    dims: int
    conv_resample: bool
    use_checkpoint: bool
    use_scale_shift_norm: bool
    resblock_updown: bool
    num_heads: int
    num_head_channels: int
    use_new_attention_order: bool
    use_spatial_transformer: bool = False
    transformer_depth: int = 1
    context_dim: int | Sequence[int] | None = None
    use_linear_in_transformer: bool = False
    legacy: bool = True

    def __post_init__(self) -> None:
        if self.num_heads == -1 and self.num_head_channels == -1:
            raise ValueError(
                "num_heads and num_head_channels are both -1: set the number of attention heads, or the channels of each"
            )
        if self.use_spatial_transformer != (self.context_dim is not None):
            raise ValueError(
                f"use_spatial_transformer={self.use_spatial_transformer} with context_dim={self.context_dim}: a spatial transformer "
                "needs the width of its context, and nothing else has one; set both or neither"
            )
        if self.use_spatial_transformer and self.dims != 2:
            raise ValueError(f"use_spatial_transformer works on pictures: dims must be 2, got {self.dims}")

    def res(self, channels: int, out_channels: int, up: bool = False, down: bool = False) -> ResBlock:
        return ResBlock(
            channels,
            self.emb_channels,
            self.dropout,
            out_channels=out_channels,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            use_scale_shift_norm=self.use_scale_shift_norm,
            up=up,
            down=down,
        )

    def down(self, channels: int) -> ResBlock | Downsample:
        if self.resblock_updown:
            return self.res(channels, channels, down=True)
        return Downsample(channels, self.conv_resample, dims=self.dims)

    def up(self, channels: int) -> ResBlock | Upsample:
        if self.resblock_updown:
            return self.res(channels, channels, up=True)
        return Upsample(channels, self.conv_resample, dims=self.dims)

    def attention(
        self, channels: int, num_heads: int | None = None, disable_self_attn: bool = False
    ) -> AttentionBlock | SpatialTransformer:
        """`num_heads` replaces the number of heads of a plain attention block; a width per head, where there is one, overrules it."""
        heads, dim_head = self._heads(channels)
        if self.use_spatial_transformer:
            return SpatialTransformer(
                channels,
                heads,
                dim_head,
                depth=self.transformer_depth,
                context_dim=self.context_dim,
                disable_self_attn=disable_self_attn,
                use_linear=self.use_linear_in_transformer,
                use_checkpoint=self.use_checkpoint,
            )
        return AttentionBlock(
            channels,
            num_heads=heads if num_heads is None else num_heads,
            num_head_channels=dim_head,
            use_checkpoint=self.use_checkpoint,
            use_new_attention_order=self.use_new_attention_order,
        )

    def _heads(self, channels: int) -> tuple[int, int]:
        """(number of heads, channels per head or -1) for that many channels, as published.

        `num_head_channels` rules where it is set. `legacy` then spreads a transformer's channels over the heads again (another
        width where they do not divide evenly), and leaves a plain block without `num_head_channels` to its number of heads.
        """
        heads, dim_head = self.num_heads, self.num_head_channels
        if dim_head != -1:
            heads = channels // dim_head
        if heads < 1 or heads > channels:
            raise ValueError(
                f"num_heads={self.num_heads}, num_head_channels={dim_head} give {heads} attention heads for {channels} channels"
            )
        respread = self.use_spatial_transformer if self.legacy else dim_head == -1
        return heads, channels // heads if respread else dim_head


class UNetTrunk(nn.Module):
    """What the UNet and the classifier share: embeddings of timestep and class, `input_blocks` and `middle_block`."""

    def __init__(
        self,
        make: LayerFactory,
        in_channels: int,
        model_channels: int,
        num_res_blocks: Sequence[int],
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[int],
        num_classes: int | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_self_attentions: Sequence[bool] | None = None,
        disable_middle_self_attn: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.dims = make.dims
        emb_channels = make.emb_channels
        self.time_embed = nn.Sequential(
            linear(model_channels, emb_channels), nn.SiLU(), linear(emb_channels, emb_channels)
        )
        self.num_classes = num_classes
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        ch = model_channels
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(conv_nd(self.dims, in_channels, ch, 3, padding=1))])
        self._skip_channels = [ch]  # of every input block's output; the expanding half takes them in reverse
        self._downsampling = 1
        for level, mult in enumerate(channel_mult):
            for block in range(num_res_blocks[level]):
                layers: list[nn.Module] = [make.res(ch, mult * model_channels)]
                ch = mult * model_channels
                if self._downsampling in attention_resolutions and (
                    num_attention_blocks is None or block < num_attention_blocks[level]
                ):
                    layers.append(
                        make.attention(
                            ch, disable_self_attn=bool(disable_self_attentions and disable_self_attentions[level])
                        )
                    )
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                self._skip_channels.append(ch)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(make.down(ch)))
                self._skip_channels.append(ch)
                self._downsampling *= 2
        self.middle_block = TimestepEmbedSequential(
            make.res(ch, ch), make.attention(ch, disable_self_attn=disable_middle_self_attn), make.res(ch, ch)
        )
        self._middle_channels = ch

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the blocks' weights, in which feature maps are computed."""
        return self.input_blocks[0][0].weight.dtype

    @property
    def size_multiple(self) -> int:
        """Height and width of the UNet's input must be multiples of this: 2 ** (number of levels - 1)."""
        return self._downsampling

    def convert_to_fp16(self) -> None:
        """Turn the blocks to float16; embeddings and output layers stay as they are."""
        self._convert(torch.float16)

    def convert_to_fp32(self) -> None:
        """Turn the blocks to float32."""
        self._convert(torch.float32)

    def _convert(self, dtype: torch.dtype) -> None:
        for blocks in (self.input_blocks, self.middle_block, getattr(self, "output_blocks", None)):
            if blocks is not None:
                blocks.to(dtype)

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != self.dims + 2 or x.shape[1] != self.in_channels:
            axes = "".join(f", {axis}" for axis in "DHW"[-self.dims :])
            raise ValueError(f"input of shape {tuple(x.shape)}: this UNet takes (B, {self.in_channels}{axes})")

    def _embed(self, x: Tensor, timesteps: Tensor | None, y: Tensor | None = None) -> Tensor:
        """The embedding (B, E) of timesteps (B,) and class labels (B,), in the dtype of the blocks."""
        batch = x.shape[0]
        if timesteps is None or timesteps.shape not in ((batch,), (1,)):
            shape = None if timesteps is None else tuple(timesteps.shape)
            raise ValueError(f"timesteps of shape {shape}: expected one for each of the {batch} inputs, ({batch},)")
        if y is None and self.num_classes is not None:
            raise ValueError(
                f"this UNet has num_classes={self.num_classes}: class labels y of shape ({batch},) are missing"
            )
        if y is not None and self.num_classes is None:
            raise ValueError(
                "class labels y were given, but this UNet was built without num_classes and would ignore them"
            )
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.time_embed[0].weight.dtype))
        if y is not None:
            if y.shape != (batch,):
                raise ValueError(f"class labels y of shape {tuple(y.shape)}: expected ({batch},)")
            emb = emb + self.label_emb(y)
        return emb.to(self.dtype)


def per_level(name: str, value: T | Sequence[T], levels: int) -> list[T]:
    """One value for each level, from one value or a sequence; `name` is the argument's, for the error."""
    if isinstance(value, int):
        return [value] * levels
    values = list(value)
    if len(values) != levels:
        raise ValueError(
            f"{name}={values} has {len(values)} values for the {levels} levels of channel_mult: give one, or one for each level"
        )
    return values
