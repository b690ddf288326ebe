"""UNet of latent diffusion models, its layers, and a classifier on its contracting half (ADM, arXiv 2105.05233).

State-dict names, constructor options and the choice of attention heads are the published ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.types import Dropout, NonNegativeInt, PositiveInt
from ldm.modules.attention import ContextBlock, SpatialTransformer, attend
from ldm.modules.diffusionmodules.util import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    has_global_hooks,
    is_own,
    is_unchanged,
    linear,
    normalization,
    repeat_batch,
    timestep_embedding,
    zero_module,
)
from ldm.modules.run_constants import cast
from ldm.published import published_names

T = TypeVar("T", int, bool)
Context = Tensor | Sequence[Tensor] | None
POOLS = ("adaptive", "attention", "spatial", "spatial_v2")


class TimestepBlock(nn.Module):
    """Base of the UNet layers that take the timestep embedding: `forward(x, emb)`, emb: (B, E)."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock, ContextBlock):
    """Layers in sequence; a `TimestepBlock` also gets the embedding, a layer that `takes_context` the context.

    x may be of a multiple of the embedding's batch, which is then repeated, see `UNetModel.forward`.
    """

    def forward(self, x: Tensor, emb: Tensor | None = None, context: Context = None) -> Tensor:
        for layer in self:
            inputs: list[Any] = [x]
            if isinstance(layer, TimestepBlock):
                inputs.append(None if emb is None else repeat_batch(emb, x.shape[0]))
            if isinstance(layer, ContextBlock):
                inputs.append(context)
            by_name = takes_context(type(layer)) and not isinstance(layer, ContextBlock)
            x = layer(*inputs, context=context) if by_name else layer(*inputs)
        return x


_TAKES_CONTEXT: dict[type, bool] = {}  # a plain dict, so that torch.compile reads it


def takes_context(layer: type[nn.Module]) -> bool:
    """Return whether layers of a class get the context: a `ContextBlock`, or one whose `forward` has a `context`."""
    if layer not in _TAKES_CONTEXT:
        declared = issubclass(layer, ContextBlock) or "context" in inspect.signature(layer.forward).parameters
        _TAKES_CONTEXT[layer] = declared
    return _TAKES_CONTEXT[layer]


class Upsample(nn.Module):
    """Nearest-neighbor upsampling by two, and a convolution if `use_conv`; dims=3 keeps the size of the first axis."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims
        if use_conv:
            self.conv = conv_nd(dims, channels, self.out_channels, 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, ..., H, W) -> (B, C', ..., 2H, 2W)."""
        x = F.interpolate(x, scale_factor=(1, 2, 2) if self.dims == 3 else 2, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Downsampling by two, a strided convolution or an average pool; dims=3 keeps the size of the first axis."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_conv, self.dims = use_conv, dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, self.out_channels, 3, stride=stride, padding=padding)
        elif self.out_channels == channels:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)
        else:
            raise ValueError(
                f"Downsample: out_channels={out_channels} needs use_conv=True; a pool keeps {channels} channels"
            )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, ..., H, W) -> (B, C', ..., H/2, W/2)."""
        return self.op(x)


class ResBlock(TimestepBlock):
    """Residual block with the timestep embedding as a shift, or as a scale and shift (`use_scale_shift_norm`).

    `up` and `down` resample by two. If the number of channels changes, the skip connection is a 1x1 convolution, or a
    3x3 one with `use_conv`.
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
        self.channels, self.emb_channels, self.out_channels = channels, emb_channels, out_channels or channels
        self.dropout, self.use_conv, self.use_checkpoint = dropout, use_conv, use_checkpoint
        self.use_scale_shift_norm, self.updown = use_scale_shift_norm, up or down
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
        self.skip_connection: nn.Module = nn.Identity()
        if self.out_channels != channels:
            kernel = 3 if use_conv else 1
            self.skip_connection = conv_nd(dims, channels, self.out_channels, kernel, padding=kernel // 2)

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
        emb = emb.view(*emb.shape, *[1] * (h.ndim - 2))  # (B, C' or 2C', 1, ...)
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map, with a residual connection and a zero-initialised projection.

    `num_head_channels` determines the number of heads unless it is -1. The 3C channels of `qkv` are ordered (head, qkv,
    channel), as in the released models, or (qkv, head, channel) with `use_new_attention_order`.
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
        if self.num_heads < 1 or channels % self.num_heads or channels % num_head_channels:
            raise ValueError(
                f"{channels} channels cannot be split into heads with num_heads={num_heads}, num_head_channels="
                f"{num_head_channels}: choose one that divides {channels} and leave the other at -1"
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
    """Attention pooling: the mean of a feature map attends to all its positions (CLIP, arXiv 2103.00020)."""

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ) -> None:
        super().__init__()
        if num_heads_channels < 1 or embed_dim % num_heads_channels:
            raise ValueError(
                f"AttentionPool2d: {embed_dim} channels are not a multiple of num_head_channels={num_heads_channels}"
            )
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.num_heads = embed_dim // num_heads_channels

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, S, S) -> (B, output_dim)."""
        x = x.flatten(2)  # (B, C, S*S)
        expected = self.positional_embedding.shape[1] - 1
        if x.shape[2] != expected:
            raise ValueError(
                f"attention pool: got {x.shape[2]} positions, expected {expected} (inputs of image_size x image_size)"
            )
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1) + self.positional_embedding.to(x.dtype)
        x = qkv_attention(self.qkv_proj(x), self.num_heads, by_head=False)  # (B, C, 1 + S*S)
        return self.c_proj(x)[:, :, 0]


def qkv_attention(qkv: Tensor, num_heads: int, by_head: bool) -> Tensor:
    """Self-attention of channel-first sequences.

    qkv: (B, 3C, N), channels ordered (head, qkv, c) if `by_head` (the legacy order), else (qkv, head, c) -> (B, C, N).
    """
    batch, width, length = qkv.shape
    if by_head:
        q, k, v = qkv.view(batch, num_heads, 3, -1, length).transpose(-1, -2).unbind(2)  # (B, H, N, D)
    else:
        q, k, v = qkv.view(batch, 3, num_heads, -1, length).transpose(-1, -2).unbind(1)
    return attend(q, k, v).transpose(-1, -2).reshape(batch, width // 3, length)


class UNetTrunk(nn.Module):
    """Contracting half of the UNets: embeddings of timestep and class, `input_blocks` and `middle_block`.

    image_size: latent size in training; any multiple of `size_multiple` works.
    num_res_blocks: residual blocks per level, one number or one for each level.
    attention_resolutions: downsampling factors (1, 2, 4, ...) of the levels with attention; the middle always has it.
    channel_mult: channels of each level in units of `model_channels`.
    conv_resample: resample by learned convolutions; resblock_updown: by residual blocks instead.
    num_classes: size of a table of class embeddings, added to the timestep's (input `y`).
    use_checkpoint: recompute activations in the backward pass instead of storing them, of all blocks, or of the
        `residual` or `attention` ones. use_fp16: the blocks in float16.
    num_heads, num_head_channels: set one of them; the second has precedence.
    num_heads_upsample: heads in the expanding half; used by plain attention with `legacy`, without `num_head_channels`.
    use_spatial_transformer, transformer_depth: attention to a context, by that many blocks.
    context_dim: width of the context, or of each block's context.
    n_embed: size of a codebook; the output then is the scores of its ids, `n_embed` channels.
    legacy: choice of the attention heads, see `_heads`; false in Stable Diffusion.
    disable_self_attentions, num_attention_blocks (for each level), disable_middle_self_attn, use_linear_in_transformer:
    options of Stable Diffusion v2.
    """

    def __init__(
        self,
        image_size: PositiveInt | Sequence[PositiveInt],
        in_channels: PositiveInt,
        model_channels: PositiveInt,
        out_channels: PositiveInt,
        num_res_blocks: NonNegativeInt | Sequence[NonNegativeInt],
        attention_resolutions: Sequence[PositiveInt],
        dropout: Dropout = 0,
        channel_mult: Sequence[PositiveInt] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: Literal[1, 2, 3] = 2,
        num_classes: PositiveInt | None = None,
        use_checkpoint: bool | Literal["residual", "attention"] = False,
        use_fp16: bool = False,
        num_heads: Literal[-1] | PositiveInt = -1,
        num_head_channels: Literal[-1] | PositiveInt = -1,
        num_heads_upsample: Literal[-1] | PositiveInt = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: PositiveInt = 1,
        context_dim: PositiveInt | Sequence[PositiveInt] | None = None,
        n_embed: PositiveInt | None = None,
        legacy: bool = True,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[NonNegativeInt] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
    ) -> None:
        super().__init__()
        if not (levels := len(channel_mult)):
            raise ValueError("channel_mult []: expected at least one level")
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks if isinstance(num_res_blocks, int) else tuple(num_res_blocks)
        self.attention_resolutions = tuple(attention_resolutions)
        self.dropout = dropout
        self.channel_mult = tuple(channel_mult)
        self.conv_resample = conv_resample
        self.dims = dims
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.use_scale_shift_norm = use_scale_shift_norm
        self.resblock_updown = resblock_updown
        self.use_new_attention_order = use_new_attention_order
        self.use_spatial_transformer = use_spatial_transformer
        self.transformer_depth = transformer_depth
        self.context_dim = context_dim if context_dim is None or isinstance(context_dim, int) else list(context_dim)
        self.n_embed = n_embed
        self.predict_codebook_ids = n_embed is not None
        self.legacy = legacy
        self.use_linear_in_transformer = use_linear_in_transformer
        self._res_blocks = per_level("num_res_blocks", num_res_blocks, levels)
        if num_attention_blocks is None:
            num_attention_blocks = [blocks + 1 for blocks in self._res_blocks]
        self._attention_blocks = per_level("num_attention_blocks", num_attention_blocks, levels)
        if disable_self_attentions is None:
            disable_self_attentions = [False] * levels
        self._no_self_attention = per_level("disable_self_attentions", disable_self_attentions, levels)
        self._check_options(any(self._no_self_attention) or disable_middle_self_attn or use_linear_in_transformer)
        self._build_contracting_half(disable_middle_self_attn)
        self._build_rest()
        if use_fp16:
            self.convert_to_fp16()

    def _check_options(self, transformer_options: bool) -> None:
        if self.num_heads == -1 and self.num_head_channels == -1:
            raise ValueError(
                "num_heads and num_head_channels are both -1: set the number of attention heads or the channels of each"
            )
        if self.use_spatial_transformer != (self.context_dim is not None):
            raise ValueError(
                f"use_spatial_transformer={self.use_spatial_transformer} with context_dim={self.context_dim}: set both "
                "or neither (a spatial transformer needs the width of its context, plain attention takes none)"
            )
        if self.use_spatial_transformer and self.dims != 2:
            raise ValueError(f"use_spatial_transformer supports images only: dims must be 2, got {self.dims}")
        if transformer_options and not self.use_spatial_transformer:
            raise ValueError(
                "disable_self_attentions, disable_middle_self_attn and use_linear_in_transformer are options of spatial"
                " transformers: set use_spatial_transformer: true and context_dim, or leave them out"
            )

    def _build_contracting_half(self, disable_middle_self_attn: bool) -> None:
        emb_channels = 4 * self.model_channels
        self.time_embed = nn.Sequential(
            linear(self.model_channels, emb_channels), nn.SiLU(), linear(emb_channels, emb_channels)
        )
        if self.num_classes is not None:
            self.label_emb = nn.Embedding(self.num_classes, emb_channels)
        ch = self.model_channels
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(conv_nd(self.dims, self.in_channels, ch, 3, padding=1))]
        )
        self._skip_channels = [ch]  # channels of every input block's output
        self._downsampling = 1
        for level, mult in enumerate(self.channel_mult):
            for block in range(self._res_blocks[level]):
                layers: list[nn.Module] = [self._res(ch, mult * self.model_channels)]
                ch = mult * self.model_channels
                if self._downsampling in self.attention_resolutions and block < self._attention_blocks[level]:
                    layers.append(self._attention(ch, self._no_self_attention[level]))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                self._skip_channels.append(ch)
            if level < len(self.channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(self._resample(Downsample, ch)))
                self._skip_channels.append(ch)
                self._downsampling *= 2
        self.middle_block = TimestepEmbedSequential(
            self._res(ch, ch), self._attention(ch, disable_middle_self_attn), self._res(ch, ch)
        )
        self._middle_channels = ch

    def _build_rest(self) -> None:
        """Build the layers after the middle block, before the conversion to float16."""

    def _res(self, channels: int, out_channels: int, up: bool = False, down: bool = False) -> ResBlock:
        return ResBlock(
            channels,
            4 * self.model_channels,
            self.dropout,
            out_channels=out_channels,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint in (True, "residual"),
            use_scale_shift_norm=self.use_scale_shift_norm,
            up=up,
            down=down,
        )

    def _resample(self, layer: type[Upsample] | type[Downsample], channels: int) -> nn.Module:
        if self.resblock_updown:
            return self._res(channels, channels, up=layer is Upsample, down=layer is Downsample)
        return layer(channels, self.conv_resample, dims=self.dims)

    def _attention(
        self, channels: int, disable_self_attn: bool, num_heads: int | None = None
    ) -> AttentionBlock | SpatialTransformer:
        """num_heads: replaces the number of heads of an AttentionBlock unless `num_head_channels` is set."""
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
                use_checkpoint=self.use_checkpoint in (True, "attention"),
            )
        return AttentionBlock(
            channels,
            num_heads=heads if num_heads is None else num_heads,
            num_head_channels=dim_head,
            use_checkpoint=self.use_checkpoint in (True, "attention"),
            use_new_attention_order=self.use_new_attention_order,
        )

    def _heads(self, channels: int) -> tuple[int, int]:
        """(number of heads, channels per head or -1) of an attention layer, as published.

        `num_head_channels`, if set, determines the number of heads. With `legacy`, a spatial transformer then divides
        its channels among them, rounding down, and an AttentionBlock keeps `num_head_channels` even if it is -1.
        """
        heads, dim_head = self.num_heads, self.num_head_channels
        if dim_head != -1:
            heads = channels // dim_head
        if heads < 1 or heads > channels:
            raise ValueError(
                f"num_heads={self.num_heads}, num_head_channels={dim_head}: {heads} heads for {channels} channels; "
                "choose at least one head and at most one per channel"
            )
        divide = self.use_spatial_transformer if self.legacy else dim_head == -1
        return heads, channels // heads if divide else dim_head

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the blocks' weights and of the feature maps."""
        return next(self.input_blocks.parameters()).dtype

    @property
    def size_multiple(self) -> int:
        """Divisor of every valid input height and width: 2 ** (number of levels - 1)."""
        return self._downsampling

    def convert_to_fp16(self) -> None:
        """Convert the blocks to float16; embeddings and output layers keep their dtype."""
        self._convert(torch.float16)

    def convert_to_fp32(self) -> None:
        """Convert the blocks to float32."""
        self._convert(torch.float32)

    def _convert(self, dtype: torch.dtype) -> None:
        for block in (*self.input_blocks, self.middle_block, *getattr(self, "output_blocks", ())):
            block.to(dtype)

    def prepare(
        self, x: Tensor, timesteps: Tensor | None, context: Context = None, y: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Check the inputs; return the embedding (B, E) of timestep and label and the context, in the blocks' dtype."""
        self._check_input(x)
        batch = x.shape[0]
        if timesteps is None or timesteps.shape not in ((batch,), (1,)):
            shape = None if timesteps is None else tuple(timesteps.shape)
            raise ValueError(f"timesteps of shape {shape}: expected one for each of the {batch} inputs, ({batch},)")
        if (y is None) != (self.num_classes is None):
            problem = "missing" if y is None else "not supported"
            raise ValueError(f"class labels y are {problem}: this UNet has num_classes={self.num_classes}")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(_dtype_of(self.time_embed)))
        if y is not None:
            if y.shape != (batch,):
                raise ValueError(f"class labels y of shape {tuple(y.shape)}: expected ({batch},)")
            emb = emb + self.label_emb(y)
        return emb.to(self.dtype), self._check_context(context, batch)

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != self.dims + 2 or x.shape[1] != self.in_channels:
            axes = "".join(f", {axis}" for axis in "DHW"[-self.dims :])
            raise ValueError(f"input of shape {tuple(x.shape)}: this UNet takes (B, {self.in_channels}{axes})")

    def _check_context(self, context: Context, batch: int) -> Context:
        if context is None:
            if self.context_dim is not None:
                raise ValueError(f"context is missing: this UNet needs one of shape ({batch}, L, {self.context_dim})")
            return None
        contexts = [context] if isinstance(context, Tensor) else context
        if self.context_dim is not None:
            widths = [self.context_dim] if isinstance(self.context_dim, int) else self.context_dim
            expected = f"({batch}, L, {' or '.join(map(str, widths))})"
            for c in contexts:
                if c.ndim != 3 or c.shape[0] % batch or c.shape[0] == 0 or c.shape[2] not in widths:
                    raise ValueError(f"context of shape {tuple(c.shape)}: expected {expected}")
        elif not any(takes_context(type(layer)) for layer in self._block_layers()):
            raise ValueError("context is not supported: this UNet was built without use_spatial_transformer")
        dtype = self.dtype
        return cast(context, dtype) if isinstance(context, Tensor) else [cast(c, dtype) for c in context]

    def _block_layers(self) -> Iterator[nn.Module]:
        for module in self.modules():
            if isinstance(module, TimestepEmbedSequential):
                yield from (layer for layer in module if not isinstance(layer, TimestepEmbedSequential))

    def encode(self, x: Tensor, emb: Tensor, context: Context = None, blocks: slice = slice(None)) -> list[Tensor]:
        """Outputs of the `input_blocks`, or of a range of them, (B, C_i, H_i, W_i) each: the skip connections.

        The last one is also the input of `middle`.
        """
        h, outputs = x.to(self.dtype), []
        for block in list(self.input_blocks)[blocks]:
            h = block(h, emb, context)
            outputs.append(h)
        return outputs

    def middle(self, h: Tensor, emb: Tensor, context: Context = None) -> Tensor:
        """Output of the `middle_block`, of the shape of its input."""
        return self.middle_block(h, emb, context)


class UNetModel(UNetTrunk):
    """Denoising UNet with attention to a context (LDM, https://arxiv.org/abs/2112.10752, section 3.3).

    Options: see UNetTrunk.
    """

    def _build_rest(self) -> None:
        ch, skips, downsampling = self._middle_channels, list(self._skip_channels), self._downsampling
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(self.channel_mult))):
            for block in range(self._res_blocks[level] + 1):
                width = self.channel_mult[level] * self.model_channels
                layers: list[nn.Module] = [self._res(ch + skips.pop(), width)]
                ch = width
                if downsampling in self.attention_resolutions and block < self._attention_blocks[level]:
                    layers.append(self._attention(ch, self._no_self_attention[level], self.num_heads_upsample))
                if level and block == self._res_blocks[level]:
                    layers.append(self._resample(Upsample, ch))
                    downsampling //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        out = zero_module(conv_nd(self.dims, ch, self.out_channels, 3, padding=1))
        self.out = nn.Sequential(normalization(ch), nn.SiLU(), out)
        if self.n_embed is not None:
            self.id_predictor = nn.Sequential(normalization(ch), conv_nd(self.dims, ch, self.n_embed, 1))

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Context = None,
        y: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Network output in the dtype of `x`; other keywords are ignored, as published, so that wrappers may pass more.

        x: (B, C, H, W), timesteps: (B,), integer or fractional (never rounded), context: (B, L, context_dim), y: (B,)
        class labels -> (B, out_channels, H, W), or (B, n_embed, H, W) scores of codebook ids.
        A context of a multiple of B, (n B, L, context_dim), is n conditions of the same inputs: what comes before the
        first context is computed once, and the output is that of n repeated inputs, (n B, out_channels, H, W).
        Raises ValueError for a size that is not a multiple of `size_multiple`, and for missing or unsupported inputs.
        """
        first = context if context is None or isinstance(context, Tensor) else context[0]
        one_cell = all(size == self.size_multiple for size in x.shape[2:])  # at the deepest level
        if one_cell and first is not None and timesteps is not None and len(first) > 0 == len(first) % len(x):
            # GroupNorm refuses one sample of one cell, but not several.
            x, timesteps = repeat_batch(x, len(first)), repeat_batch(timesteps, len(first))
            y = None if y is None else repeat_batch(y, len(first))
        emb, context = self.prepare(x, timesteps, context, y)  # (B, 4 * model_channels), (B, L, context_dim)
        skips = self.encode(x, emb, context)  # (B, C_i, H_i, W_i) each
        h = self.middle(skips[-1], emb, context)  # (B, C, H/f, W/f), f = size_multiple
        h = self.decode(h, skips, emb, context)  # (B, C, H, W)
        return self.head(h).to(x.dtype)

    def _check_input(self, x: Tensor) -> None:
        super()._check_input(x)
        # The expanding half returns an odd feature map one larger than its skip connection.
        multiple, size = self.size_multiple, x.shape[-min(self.dims, 2) :]
        if any(n % multiple for n in size):
            near = (max(multiple, round(n / multiple) * multiple) for n in size)
            raise ValueError(
                f"input of size {'x'.join(map(str, size))}: this UNet needs multiples of {multiple}; "
                f"the nearest is {'x'.join(map(str, near))}"
            )

    @property
    def repeats_inputs(self) -> bool:
        """True if `forward` takes a context of a multiple of the batch: no block of other code, no hook."""
        context_blocks = [layer for layer in self._block_layers() if takes_context(type(layer))]
        parts = ("forward", "prepare", "encode", "middle", "decode", "head")
        own = is_own(self, *parts) and all(getattr(type(self), part) is getattr(UNetModel, part) for part in parts)
        known = bool(context_blocks) and all(type(layer) is SpatialTransformer for layer in context_blocks)
        return own and known and all(map(is_unchanged, self.modules())) and not has_global_hooks()

    def decode(
        self, h: Tensor, skips: list[Tensor], emb: Tensor, context: Context = None, blocks: slice = slice(None)
    ) -> Tensor:
        """Output of the `output_blocks`, or of a range of them; each removes the last of `skips` from the list."""
        for block in list(self.output_blocks)[blocks]:
            h = block(torch.cat([h, repeat_batch(skips.pop(), h.shape[0])], dim=1), emb, context)
        return h

    def head(self, h: Tensor) -> Tensor:
        """Network output for the last feature map (B, C, H, W), in the dtype of the output layers."""
        layers = self.id_predictor if self.predict_codebook_ids else self.out
        return layers(h.to(_dtype_of(layers)))


class EncoderUNetModel(UNetTrunk):
    """Contracting half of the UNet with a head: the noisy classifier of ADM (arXiv 2105.05233, section 4).

    pool: `adaptive` averages the middle block's output, `attention` pools it by attention (only for `image_size`),
    `spatial` and `spatial_v2` average the outputs of all blocks and apply a small network to them.
    num_heads_upsample: part of the published signature; unused, because there is no expanding half.
    """

    def __init__(
        self,
        image_size: PositiveInt,
        in_channels: PositiveInt,
        model_channels: PositiveInt,
        out_channels: PositiveInt,
        num_res_blocks: NonNegativeInt | Sequence[NonNegativeInt],
        attention_resolutions: Sequence[PositiveInt],
        dropout: Dropout = 0,
        channel_mult: Sequence[PositiveInt] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: Literal[1, 2, 3] = 2,
        use_checkpoint: bool | Literal["residual", "attention"] = False,
        use_fp16: bool = False,
        num_heads: Literal[-1] | PositiveInt = 1,
        num_head_channels: Literal[-1] | PositiveInt = -1,
        num_heads_upsample: Literal[-1] | PositiveInt = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ) -> None:
        if pool not in POOLS:
            raise ValueError(f"pool={pool!r}: expected one of {', '.join(POOLS)}")
        if pool == "attention" and (num_head_channels == -1 or dims != 2):
            raise ValueError(f"pool='attention' needs num_head_channels and dims=2; got {num_head_channels} and {dims}")
        super().__init__(
            image_size,
            in_channels,
            model_channels,
            out_channels,
            num_res_blocks,
            attention_resolutions,
            dropout,
            channel_mult,
            conv_resample,
            dims,
            use_checkpoint=use_checkpoint,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
        )
        self.pool = pool
        self.out = nn.Sequential(*self._head(image_size))
        if use_fp16:
            self.convert_to_fp16()

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """x: (B, C, H, W), timesteps: (B,) -> (B, out_channels), in the dtype of `x`."""
        emb, _ = self.prepare(x, timesteps)
        outputs = self.encode(x, emb)  # (B, C_i, H_i, W_i) each
        h = self.middle(outputs[-1], emb)  # (B, C, H/f, W/f)
        if self.pool.startswith("spatial"):
            h = torch.cat([out.flatten(2).mean(dim=2) for out in (*outputs, h)], dim=1)  # (B, sum of all channels)
        return self.out(h.to(_dtype_of(self.out))).to(x.dtype)

    def _head(self, image_size: int) -> list[nn.Module]:
        ch, out = self._middle_channels, self.out_channels
        if self.pool == "adaptive":
            average = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[self.dims - 1](1)
            return [normalization(ch), nn.SiLU(), average, zero_module(conv_nd(self.dims, ch, out, 1)), nn.Flatten()]
        if self.pool == "attention":
            size = image_size // self._downsampling
            return [normalization(ch), nn.SiLU(), AttentionPool2d(size, ch, self.num_head_channels, out)]
        activation = [nn.ReLU()] if self.pool == "spatial" else [normalization(2048), nn.SiLU()]
        return [nn.Linear(sum(self._skip_channels) + ch, 2048), *activation, nn.Linear(2048, out)]


def per_level(name: str, value: T | Sequence[T], levels: int) -> list[T]:
    """One value for each level, from one value or a sequence; `name` is the argument named in the error."""
    values = [value] * levels if isinstance(value, int) else list(value)
    if len(values) != levels:
        raise ValueError(
            f"{name}={values} has {len(values)} values for the {levels} levels of channel_mult: pass 1 or {levels}"
        )
    return values


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


__getattr__ = published_names(__name__)
