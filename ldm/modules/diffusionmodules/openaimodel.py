"""The UNet of latent diffusion models and the classifier on its contracting half (ADM, https://arxiv.org/abs/2105.05233).

The names in the state_dict and the constructors' options, with their quirks in choosing attention heads, are the published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.unet_blocks import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    ResBlock,
    TimestepBlock,
    TimestepEmbedSequential,
    Upsample,
)
from ldm.modules.diffusionmodules.unet_trunk import LayerFactory, UNetTrunk, per_level
from ldm.modules.diffusionmodules.util import conv_nd, normalization, timestep_embedding, zero_module

# Downstream code imports the blocks from here.
__all__ = [
    "AttentionBlock",
    "AttentionPool2d",
    "Downsample",
    "EncoderUNetModel",
    "ResBlock",
    "SpatialTransformer",
    "TimestepBlock",
    "TimestepEmbedSequential",
    "UNetModel",
    "Upsample",
    "timestep_embedding",
]

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")


class UNetModel(UNetTrunk):
    """The denoising UNet with attention on a context (LDM, https://arxiv.org/abs/2112.10752, section 3.3).

    image_size: the latent size that the model is trained for; any multiple of `size_multiple` works.
    num_res_blocks: residual blocks of a level, one number or one for each level.
    attention_resolutions: downsampling factors (1, 2, 4, ...) of the levels with attention; the middle block always has it.
    channel_mult: the width of each level in units of `model_channels`.
    conv_resample: resample by learned convolutions; resblock_updown: by residual blocks instead.
    num_classes: size of a table of class embeddings, added to the timestep's (input `y`).
    use_checkpoint: compute activations again in the backward pass instead of keeping them. use_fp16: the blocks in float16.
    num_heads, num_head_channels: one of the two; the channels of a head win where both are given. num_heads_upsample: heads in the
    expanding half, for plain attention under `legacy` without `num_head_channels` (elsewhere it has no effect, as published).
    use_spatial_transformer, transformer_depth, context_dim: transformer blocks on a context of that width (or one for each block).
    n_embed: predict the ids of a codebook of that size; the output then has `n_embed` channels of scores.
    legacy: how the heads are chosen (`LayerFactory`); false in Stable Diffusion.
    disable_self_attentions, num_attention_blocks (for each level), disable_middle_self_attn, use_linear_in_transformer:
    options of Stable Diffusion v2.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | Sequence[int] | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
    ) -> None:
        make = LayerFactory(
            emb_channels=4 * model_channels,
            dropout=dropout,
            dims=dims,
            conv_resample=conv_resample,
            use_checkpoint=use_checkpoint,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_new_attention_order=use_new_attention_order,
            use_spatial_transformer=use_spatial_transformer,
            transformer_depth=transformer_depth,
            context_dim=context_dim
            if context_dim is None or isinstance(context_dim, int)
            else [int(width) for width in context_dim],
            use_linear_in_transformer=use_linear_in_transformer,
            legacy=legacy,
        )
        levels = len(channel_mult)
        res_blocks = per_level("num_res_blocks", num_res_blocks, levels)
        attention_blocks = (
            None if num_attention_blocks is None else per_level("num_attention_blocks", num_attention_blocks, levels)
        )
        no_self = [False] * levels
        if disable_self_attentions is not None:
            no_self = per_level("disable_self_attentions", disable_self_attentions, levels)
        if (any(no_self) or disable_middle_self_attn or use_linear_in_transformer) and not use_spatial_transformer:
            raise ValueError(
                "disable_self_attentions, disable_middle_self_attn and use_linear_in_transformer are options of spatial "
                "transformers: set use_spatial_transformer: true and context_dim, or leave them out"
            )
        super().__init__(
            make,
            in_channels,
            model_channels,
            res_blocks,
            attention_resolutions,
            channel_mult,
            num_classes=num_classes,
            num_attention_blocks=attention_blocks,
            disable_self_attentions=no_self,
            disable_middle_self_attn=disable_middle_self_attn,
        )
        self.image_size = image_size
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks if isinstance(num_res_blocks, int) else tuple(num_res_blocks)
        self.attention_resolutions = tuple(attention_resolutions)
        self.channel_mult = tuple(channel_mult)
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.context_dim = make.context_dim
        self.predict_codebook_ids = n_embed is not None

        ch, skips, downsampling = self._middle_channels, list(self._skip_channels), self._downsampling
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            for block in range(res_blocks[level] + 1):
                layers: list[nn.Module] = [make.res(ch + skips.pop(), channel_mult[level] * model_channels)]
                ch = channel_mult[level] * model_channels
                if downsampling in attention_resolutions and (
                    attention_blocks is None or block < attention_blocks[level]
                ):
                    layers.append(
                        make.attention(ch, num_heads=self.num_heads_upsample, disable_self_attn=no_self[level])
                    )
                if level and block == res_blocks[level]:
                    layers.append(make.up(ch))
                    downsampling //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        self.out = nn.Sequential(
            normalization(ch), nn.SiLU(), zero_module(conv_nd(dims, ch, out_channels, 3, padding=1))
        )
        if self.predict_codebook_ids:
            self.id_predictor = nn.Sequential(normalization(ch), conv_nd(dims, ch, n_embed, 1))
        if use_fp16:
            self.convert_to_fp16()

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | Sequence[Tensor] | None = None,
        y: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The network's output, in the dtype of `x`; further keywords are ignored, as published, so that wrappers may pass more.

        x: (B, C, H, W), timesteps: (B,), whole or fractional and never rounded, context: (B, L, context_dim), y: (B,) class labels
        -> (B, out_channels, H, W), or (B, n_embed, H, W) scores of codebook ids.
        Raises ValueError for a size that is no multiple of `size_multiple`, and for missing or superfluous inputs.
        """
        self._check_input(x)
        self._check_size(x)
        emb = self._embed(x, timesteps, y)  # (B, 4 * model_channels)
        context = self._context(x, context)
        h = x.to(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb, context)  # (B, C_i, H_i, W_i)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context)
        head = self.id_predictor if self.predict_codebook_ids else self.out
        return head(h.to(head[-1].weight.dtype)).to(x.dtype)

    def _check_size(self, x: Tensor) -> None:
        # An odd feature map comes back one larger from the expanding half and does not fit its skip connection.
        multiple, size = self.size_multiple, tuple(x.shape[-min(self.dims, 2) :])
        if any(n % multiple for n in size):
            near = [max(multiple, round(n / multiple) * multiple) for n in size]
            given, nearest = ("x".join(map(str, numbers)) for numbers in (size, near))
            raise ValueError(
                f"input of size {given}: this UNet needs multiples of {multiple}; the nearest is {nearest}"
            )

    def _context(self, x: Tensor, context: Tensor | Sequence[Tensor] | None) -> Tensor | list[Tensor] | None:
        """The context in the dtype of the blocks."""
        if self.context_dim is None:
            if context is not None:
                raise ValueError(
                    "a context was given, but this UNet was built without use_spatial_transformer and would ignore it"
                )
            return None
        if context is None:
            raise ValueError(
                f"this UNet attends to a context of shape ({x.shape[0]}, L, {self.context_dim}), which is missing"
            )
        if not torch.is_tensor(context):
            return [self._context(x, part) for part in context]
        widths = (self.context_dim,) if isinstance(self.context_dim, int) else self.context_dim
        if context.ndim != 3 or context.shape[0] != x.shape[0] or context.shape[2] not in widths:
            raise ValueError(
                f"context of shape {tuple(context.shape)}: expected ({x.shape[0]}, L, {' or '.join(map(str, widths))})"
            )
        return context.to(self.dtype)


class EncoderUNetModel(UNetTrunk):
    """The contracting half of the UNet with a head: the noisy classifier of ADM (https://arxiv.org/abs/2105.05233, section 4).

    pool: `adaptive` averages the middle's output, `attention` pools it by attention (inputs must be `image_size` large), `spatial`
    and `spatial_v2` average every block's output and run a small network on all of them. `num_heads_upsample` belongs to the
    published signature and has no meaning here: there is no expanding half.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ) -> None:
        if pool not in POOLS:
            raise ValueError(f"pool={pool!r}: expected one of {', '.join(POOLS)}")
        if pool == "attention" and (num_head_channels == -1 or dims != 2):
            raise ValueError(
                f"pool='attention' needs num_head_channels, the width of its heads, and dims=2; got {num_head_channels}, {dims}"
            )
        make = LayerFactory(
            emb_channels=4 * model_channels,
            dropout=dropout,
            dims=dims,
            conv_resample=conv_resample,
            use_checkpoint=use_checkpoint,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_new_attention_order=use_new_attention_order,
        )
        res_blocks = per_level("num_res_blocks", num_res_blocks, len(channel_mult))
        super().__init__(make, in_channels, model_channels, res_blocks, attention_resolutions, channel_mult)
        self.image_size = image_size
        self.out_channels = out_channels
        self.num_head_channels = num_head_channels
        self.pool = pool
        self.out = self._head(dims)
        if use_fp16:
            self.convert_to_fp16()

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """x: (B, C, H, W), timesteps: (B,) -> (B, out_channels), in the dtype of `x`."""
        self._check_input(x)
        emb = self._embed(x, timesteps)
        h = x.to(self.dtype)
        averages = []
        for block in (*self.input_blocks, self.middle_block):
            h = block(h, emb)
            if self.pool.startswith("spatial"):
                averages.append(h.flatten(2).mean(dim=2))
        if averages:
            h = torch.cat(averages, dim=1)  # (B, sum of all blocks' channels)
        return self.out(h.to(next(self.out.parameters()).dtype)).to(x.dtype)

    def _head(self, dims: int) -> nn.Sequential:
        ch = self._middle_channels
        if self.pool == "adaptive":
            average = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1](1)
            return nn.Sequential(
                normalization(ch),
                nn.SiLU(),
                average,
                zero_module(conv_nd(dims, ch, self.out_channels, 1)),
                nn.Flatten(),
            )
        if self.pool == "attention":
            attention = AttentionPool2d(
                self.image_size // self._downsampling, ch, self.num_head_channels, self.out_channels
            )
            return nn.Sequential(normalization(ch), nn.SiLU(), attention)
        activation = [nn.ReLU()] if self.pool == "spatial" else [normalization(2048), nn.SiLU()]
        return nn.Sequential(
            nn.Linear(sum(self._skip_channels) + ch, 2048), *activation, nn.Linear(2048, self.out_channels)
        )
