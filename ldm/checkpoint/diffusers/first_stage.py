"""The first stage (KL or VQ): its layout, from our YAML or from diffusers' config.json, and what follows from that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm.checkpoint.diffusers.rules import (
    CONV2D,
    ConversionError,
    Rule,
    attention_levels,
    check_supported,
    same,
    same_layers,
)

KL, VQ = "AutoencoderKL", "VQModel"
_DOWN, _UP = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
_HAS_ATTENTION = {name: bool(attends) for pair in (_DOWN, _UP) for attends, name in enumerate(pair)}
_SUPPORTED: dict[str, dict[str, Any]] = {  # values of our ddconfig, and of diffusers' config.json
    "ddconfig": {"use_linear_attn": False, "resamp_with_conv": True, "tanh_out": False, "give_pre_end": False},
    "config.json": {
        **{"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True},
        **{"norm_type": "group", "lookup_from_codebook": False},
        **{"shift_factor": None, "latents_mean": None, "latents_std": None},
    },
}
_RESNET = tuple((layer, layer) for layer in ("norm1", "conv1", "norm2", "conv2"))
_ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))


class StageLayout(NamedTuple):
    """All that names and diffusers' config depend on. Sequences have an entry for each level, full size first."""

    kind: str  # KL or VQ
    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    res_blocks: int  # in the encoder; one more in the decoder
    attention: tuple[bool, ...]
    middle_attention: bool
    z_channels: int
    embed_dim: int
    norm_num_groups: int
    codes: int | None = None  # size of the codebook

    @classmethod
    def from_params(cls, kind: str, params: Mapping[str, Any]) -> StageLayout:
        """From the `params` of a first stage in our YAML; ConversionError for one that diffusers does not support."""
        dd = params["ddconfig"]
        check_supported("ddconfig", dd, _SUPPORTED["ddconfig"], by="diffusers")
        if dd.get("attn_type", "vanilla") not in ("vanilla", "none"):
            raise ConversionError(f"ddconfig: attn_type {dd['attn_type']} is not supported by diffusers")
        if params.get("remap"):
            raise ConversionError(f"remap {params['remap']} is not supported by diffusers")
        if kind == KL and dd["z_channels"] != params["embed_dim"]:
            sizes = f"z_channels {dd['z_channels']}, embed_dim {params['embed_dim']}"
            raise ConversionError(f"{sizes}: diffusers' {KL} needs them to be equal")
        mult = tuple(dd.get("ch_mult", (1, 2, 4, 8)))
        attends = dd.get("attn_type", "vanilla") != "none"
        return cls(
            kind=kind,
            in_channels=dd["in_channels"],
            out_channels=dd["out_ch"],
            channels=tuple(dd["ch"] * m for m in mult),
            res_blocks=dd["num_res_blocks"],
            attention=tuple(
                attends and dd["resolution"] // 2**level in tuple(dd["attn_resolutions"]) for level in range(len(mult))
            ),
            middle_attention=attends,
            z_channels=dd["z_channels"],
            embed_dim=params["embed_dim"],
            norm_num_groups=dd.get("norm_num_groups", 32),
            codes=params["n_embed"] if kind == VQ else None,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> StageLayout:
        """From diffusers' config.json of an autoencoder; ConversionError for one that this framework does not build."""
        kind = config.get("_class_name")
        if kind not in (KL, VQ):
            raise ConversionError(f"config.json: {kind} is not supported; expected {KL} or {VQ}")
        check_supported("config.json", config, _SUPPORTED["config.json"])
        z_channels = config.get("latent_channels", 3 if kind == VQ else 4)
        return cls(
            kind=kind,
            in_channels=config.get("in_channels", 3),
            out_channels=config.get("out_channels", 3),
            channels=tuple(config["block_out_channels"]),
            res_blocks=config.get("layers_per_block", 1),
            attention=attention_levels("config.json", config, _HAS_ATTENTION),
            middle_attention=bool(config.get("mid_block_add_attention", True)),
            z_channels=z_channels,
            embed_dim=(config.get("vq_embed_dim") or z_channels) if kind == VQ else z_channels,
            norm_num_groups=config.get("norm_num_groups", 32),
            codes=config.get("num_vq_embeddings", 256) if kind == VQ else None,
        )

    def config(self, sample_size: int, scale_factor: float) -> dict[str, Any]:
        """diffusers' config.json; sample_size: image side; scale_factor: of the latents, 1 for a first stage alone."""
        config = {
            "_class_name": self.kind,
            "act_fn": "silu",
            "norm_num_groups": self.norm_num_groups,
            "sample_size": sample_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": list(self.channels),
            "layers_per_block": self.res_blocks,
            "down_block_types": [_DOWN[attends] for attends in self.attention],
            "up_block_types": [_UP[attends] for attends in reversed(self.attention)],
            "mid_block_add_attention": self.middle_attention,
            "latent_channels": self.z_channels,
            "scaling_factor": scale_factor,
        }
        return config | ({"num_vq_embeddings": self.codes, "vq_embed_dim": self.embed_dim} if self.kind == VQ else {})

    def rules(self) -> list[Rule]:
        """Every tensor's rule. Published `decoder.up` counts from the full size, diffusers' in execution order."""
        levels = list(enumerate(self.channels))
        rules = same("encoder.conv_in", "encoder.conv_in")
        for level, _ in levels:
            ours, theirs = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
            rules += self._level(ours, theirs, level, self.channels[max(level - 1, 0)], self.res_blocks)
            if level != len(levels) - 1:
                rules += same(f"{ours}.downsample.conv", f"{theirs}.downsamplers.0.conv")
        rules += [*self._middle("encoder"), *_output("encoder"), *same("decoder.conv_in", "decoder.conv_in")]
        rules += self._middle("decoder")
        width = self.channels[-1]
        for position, (level, channels) in enumerate(reversed(levels)):
            ours, theirs = f"decoder.up.{level}", f"decoder.up_blocks.{position}"
            rules += self._level(ours, theirs, level, width, self.res_blocks + 1)
            if level:
                rules += same(f"{ours}.upsample.conv", f"{theirs}.upsamplers.0.conv")
            width = channels
        rules += _output("decoder")
        rules += [*same("quant_conv", "quant_conv"), *same("post_quant_conv", "post_quant_conv")]
        return rules + (same("quantize.embedding", "quantize.embedding", ("weight",)) if self.kind == VQ else [])

    def _level(self, ours: str, theirs: str, level: int, width: int, blocks: int) -> list[Rule]:
        rules = []
        for block in range(blocks):
            shortcut = block == 0 and width != self.channels[level]
            rules += _resnet(f"{ours}.block.{block}", f"{theirs}.resnets.{block}", shortcut)
            if self.attention[level]:
                rules += _attention(f"{ours}.attn.{block}", f"{theirs}.attentions.{block}")
        return rules

    def _middle(self, half: str) -> list[Rule]:
        attention = _attention(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0") if self.middle_attention else []
        first = _resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", False)
        return [*first, *attention, *_resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", False)]


def _output(half: str) -> list[Rule]:
    return [*same(f"{half}.norm_out", f"{half}.conv_norm_out"), *same(f"{half}.conv_out", f"{half}.conv_out")]


def _resnet(ours: str, theirs: str, shortcut: bool) -> list[Rule]:
    rules = same_layers(ours, theirs, _RESNET)
    return rules + (same(f"{ours}.nin_shortcut", f"{theirs}.conv_shortcut") if shortcut else [])


def _attention(ours: str, theirs: str) -> list[Rule]:
    rules = same(f"{ours}.norm", f"{theirs}.group_norm")
    for our_layer, their_layer in _ATTENTION:
        rules += [Rule(f"{ours}.{our_layer}.weight", (f"{theirs}.{their_layer}.weight",), CONV2D)]
        rules += same(f"{ours}.{our_layer}", f"{theirs}.{their_layer}", ("bias",))
    return rules
