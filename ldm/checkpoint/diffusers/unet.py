"""The UNet: its layout, from our YAML or from diffusers' config.json, and what follows from that.

Published names number every block in execution order (`input_blocks.0`, `.1`, ...); diffusers counts by level, and
residual blocks, attentions and resampling layers of a level separately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ldm.checkpoint.diffusers.rules import (
    CONV1D,
    ConversionError,
    Rule,
    attention_levels,
    by_head,
    check_supported,
    same,
    same_layers,
)

CROSS, PLAIN = "UNet2DConditionModel", "UNet2DModel"
_DOWN = {CROSS: "CrossAttnDownBlock2D", PLAIN: "AttnDownBlock2D"}
_UP = {CROSS: "CrossAttnUpBlock2D", PLAIN: "AttnUpBlock2D"}
_FIXED = {  # diffusers' settings that give the published UNet
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
}
_SUPPORTED: dict[str, dict[str, Any]] = {  # values of our unet_config, and of diffusers' config.json
    "unet_config": {
        **{"dims": 2, "conv_resample": True, "resblock_updown": False, "use_new_attention_order": False},
        **{"n_embed": None, "num_attention_blocks": None},
    },
    "unet/config.json": {
        **_FIXED,
        **{"add_attention": True, "dual_cross_attention": False, "resnet_skip_time_act": False},
        **{"addition_embed_type": None, "class_embed_type": None, "encoder_hid_dim": None},
    },
}
_RESNET = (
    *(("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj")),
    *(("out_layers.0", "norm2"), ("out_layers.3", "conv2")),
)


class UNetLayout(NamedTuple):
    """All that names and diffusers' config depend on. Sequences have an entry for each level, full size first."""

    kind: str  # CROSS: transformers with context; PLAIN: self-attention only
    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    res_blocks: tuple[int, ...]  # on the way down; one more on the way up
    heads: tuple[int | None, ...]  # of attention; None for a level without
    middle_heads: int
    depth: int = 1  # transformer blocks per attention layer
    context_dim: int | None = None
    linear: bool = False  # linear instead of convolutional projections
    cross_only: tuple[bool, ...] = ()  # levels whose first attention reads the context too
    middle_cross_only: bool = False
    classes: int | None = None
    scale_shift: bool = False

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> UNetLayout:
        """From the `params` of a UNetModel in our YAML; ConversionError for one that diffusers does not support."""
        mult = tuple(params.get("channel_mult") or (1, 2, 4, 8))
        channels = tuple(int(params["model_channels"]) * m for m in mult)
        levels = len(mult)
        cross = bool(params.get("use_spatial_transformer"))
        per_head, heads = params.get("num_head_channels", -1), params.get("num_heads", -1)
        check_supported("unet_config", params, _SUPPORTED["unet_config"], by="diffusers")
        if mult[0] != 1:
            raise ConversionError(f"channel_mult {list(mult)}: diffusers' UNets must begin with 1 (model_channels)")
        if not cross and params.get("num_heads_upsample", -1) not in (-1, heads):
            raise ConversionError(f"num_heads_upsample {params['num_heads_upsample']} is not supported by diffusers")

        def heads_of(width: int) -> int:
            return width // per_head if per_head != -1 else heads

        attended = [2**level in tuple(params["attention_resolutions"]) for level in range(levels)]
        layout = cls(
            kind=CROSS if cross else PLAIN,
            in_channels=params["in_channels"],
            out_channels=params["out_channels"],
            channels=channels,
            res_blocks=_each(params["num_res_blocks"], levels),
            heads=tuple(heads_of(width) if has else None for width, has in zip(channels, attended)),
            middle_heads=heads_of(channels[-1]),
            depth=int(params.get("transformer_depth", 1)) if cross else 1,
            context_dim=_one_width(params.get("context_dim")),
            linear=bool(params.get("use_linear_in_transformer", False)),
            cross_only=_each(params.get("disable_self_attentions") or False, levels),
            middle_cross_only=bool(params.get("disable_middle_self_attn", False)),
            classes=params.get("num_classes"),
            scale_shift=bool(params.get("use_scale_shift_norm", False)),
        )
        if not cross:
            layout._check_plain()
        return layout

    def _check_plain(self) -> None:
        """Raise ConversionError for a UNet without context whose levels differ more than UNet2DModel's can."""
        attended = [(width, heads) for width, heads in zip(self.channels, self.heads) if heads is not None]
        widths = {width // heads for width, heads in (*attended, (self.channels[-1], self.middle_heads))}
        if len(widths) > 1:
            raise ConversionError(
                f"attention heads are {', '.join(map(str, sorted(widths)))} channels wide; diffusers' {PLAIN} supports "
                f"one width for all levels (num_head_channels in the YAML)"
            )
        if len(set(self.res_blocks)) > 1:
            blocks = list(self.res_blocks)
            raise ConversionError(f"num_res_blocks {blocks}: diffusers' {PLAIN} supports one number for all levels")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UNetLayout:
        """From diffusers' unet/config.json; ConversionError for a UNet that this framework does not build."""
        kind = config.get("_class_name")
        if kind not in (CROSS, PLAIN):
            raise ConversionError(f"unet/config.json: {kind} is not supported; expected {CROSS} or {PLAIN}")
        channels = tuple(config["block_out_channels"])
        levels = len(channels)
        known = {_DOWN[kind]: True, "DownBlock2D": False, _UP[kind]: True, "UpBlock2D": False}
        attended = attention_levels("unet/config.json", config, known)
        check_supported("unet/config.json", config, _SUPPORTED["unet/config.json"])
        if kind == CROSS:  # attention_head_dim is misnamed: it is the number of heads
            every = _each(config.get("num_attention_heads") or config.get("attention_head_dim", 8), levels)
            context_dim = _one_width(config.get("cross_attention_dim", 1280))
        else:
            width = config.get("attention_head_dim", 8)
            every, context_dim = tuple(1 if width is None else c // width for c in channels), None
        return cls(
            kind=kind,
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            channels=channels,
            res_blocks=_each(config.get("layers_per_block", 2), levels),
            heads=tuple(heads if has else None for heads, has in zip(every, attended)),
            middle_heads=every[-1],
            depth=_one_width(config.get("transformer_layers_per_block", 1)),
            context_dim=context_dim,
            linear=bool(config.get("use_linear_projection", False)),
            cross_only=_each(config.get("only_cross_attention") or False, levels),
            middle_cross_only=_middle_cross_only(config),
            classes=config.get("num_class_embeds"),
            scale_shift=config.get("resnet_time_scale_shift", "default") == "scale_shift",
        )

    def config(self, sample_size: int | Sequence[int]) -> dict[str, Any]:
        """diffusers' unet/config.json; sample_size: the latent's side."""
        attended = [heads is not None for heads in self.heads]
        config: dict[str, Any] = {
            "_class_name": self.kind,
            **_FIXED,
            "sample_size": sample_size if isinstance(sample_size, int) else list(sample_size),
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": list(self.channels),
            "layers_per_block": self.res_blocks[0] if len(set(self.res_blocks)) == 1 else list(self.res_blocks),
            "down_block_types": [_DOWN[self.kind] if has else "DownBlock2D" for has in attended],
            "up_block_types": [_UP[self.kind] if has else "UpBlock2D" for has in reversed(attended)],
            "resnet_time_scale_shift": "scale_shift" if self.scale_shift else "default",
        }
        if self.classes is not None:
            config["num_class_embeds"] = self.classes
        if self.kind == PLAIN:
            return {**config, "attention_head_dim": self.channels[-1] // self.middle_heads}
        heads = [self.middle_heads if value is None else value for value in self.heads]
        heads[-1] = self.middle_heads
        return {
            **config,
            "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
            "cross_attention_dim": self.context_dim,
            "transformer_layers_per_block": self.depth,
            "use_linear_projection": self.linear,
            "only_cross_attention": list(self.cross_only) if any(self.cross_only) else False,
            "mid_block_only_cross_attention": self.middle_cross_only,
            "dual_cross_attention": False,
        }

    def rules(self) -> list[Rule]:
        """Every tensor's rule, in execution order."""
        rules = [*same("time_embed.0", "time_embedding.linear_1"), *same("time_embed.2", "time_embedding.linear_2")]
        if self.classes is not None:
            rules += same("label_emb", "class_embedding", ("weight",))
        rules += same("input_blocks.0.0", "conv_in")
        levels = list(enumerate(self.channels))
        width, skips, number = self.channels[0], [self.channels[0]], 1
        for level, channels in levels:
            for block in range(self.res_blocks[level]):
                rules += self._block(f"input_blocks.{number}", f"down_blocks.{level}", block, level, width != channels)
                width, number = channels, number + 1
                skips.append(width)
            if level != len(levels) - 1:
                rules += same(f"input_blocks.{number}.0.op", f"down_blocks.{level}.downsamplers.0.conv")
                number += 1
                skips.append(width)
        rules += _resnet("middle_block.0", "mid_block.resnets.0", False)
        rules += self._attention("middle_block.1", "mid_block.attentions.0", self.middle_heads)
        rules += _resnet("middle_block.2", "mid_block.resnets.1", False)
        number = 0
        for up, (level, channels) in enumerate(reversed(levels)):
            for block in range(self.res_blocks[level] + 1):
                shortcut = width + skips.pop() != channels
                rules += self._block(f"output_blocks.{number}", f"up_blocks.{up}", block, level, shortcut)
                if level and block == self.res_blocks[level]:
                    position = 1 if self.heads[level] is None else 2
                    rules += same(f"output_blocks.{number}.{position}.conv", f"up_blocks.{up}.upsamplers.0.conv")
                width, number = channels, number + 1
        return [*rules, *same("out.0", "conv_norm_out"), *same("out.2", "conv_out")]

    def _block(self, ours: str, theirs: str, block: int, level: int, shortcut: bool) -> list[Rule]:
        resnet = _resnet(f"{ours}.0", f"{theirs}.resnets.{block}", shortcut)
        return resnet + self._attention(f"{ours}.1", f"{theirs}.attentions.{block}", self.heads[level])

    def _attention(self, ours: str, theirs: str, heads: int | None) -> list[Rule]:
        if heads is None:
            return []
        return _transformer(ours, theirs, self.depth) if self.kind == CROSS else _plain_attention(ours, theirs, heads)


def _resnet(ours: str, theirs: str, shortcut: bool) -> list[Rule]:
    rules = same_layers(ours, theirs, _RESNET)
    return rules + (same(f"{ours}.skip_connection", f"{theirs}.conv_shortcut") if shortcut else [])


def _transformer(ours: str, theirs: str, depth: int) -> list[Rule]:
    names = [f"{layer}.{leaf}" for layer in ("norm", "proj_in", "proj_out") for leaf in ("weight", "bias")]
    for block in (f"transformer_blocks.{k}" for k in range(depth)):
        for attention in (f"{block}.attn1", f"{block}.attn2"):
            names += [f"{attention}.{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out.0")]
            names += [f"{attention}.to_out.0.bias"]
        layers = (f"{block}.{name}" for name in ("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"))
        names += [f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")]
    return [Rule(f"{ours}.{name}", (f"{theirs}.{name}",)) for name in names]


def _plain_attention(ours: str, theirs: str, heads: int) -> list[Rule]:
    parts = [f"{theirs}.{name}" for name in ("to_q", "to_k", "to_v")]
    return [
        *same(f"{ours}.norm", f"{theirs}.group_norm"),
        Rule(f"{ours}.qkv.weight", tuple(f"{part}.weight" for part in parts), by_head(heads, kernel=1)),
        Rule(f"{ours}.qkv.bias", tuple(f"{part}.bias" for part in parts), by_head(heads, kernel=0)),
        Rule(f"{ours}.proj_out.weight", (f"{theirs}.to_out.0.weight",), CONV1D),
        *same(f"{ours}.proj_out", f"{theirs}.to_out.0", ("bias",)),
    ]


def _middle_cross_only(config: Mapping[str, Any]) -> bool:
    own, all_levels = config.get("mid_block_only_cross_attention"), config.get("only_cross_attention")
    return bool(own if own is not None else all_levels if isinstance(all_levels, bool) else False)


def _each(value: Any, levels: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,) * levels


def _one_width(value: Any) -> Any:
    widths = set(value) if isinstance(value, Sequence) else {value}
    if len(widths) != 1:
        raise ConversionError(f"{value}: different values per level are not supported")
    return widths.pop()
