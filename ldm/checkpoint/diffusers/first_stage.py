"""The first stage (KL or VQ): its layout from our YAML or from diffusers' config.json, diffusers' config of it, and the table of names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm.checkpoint.diffusers.rules import CONV2D, InterchangeError, Rule, same

KL, VQ = "AutoencoderKL", "VQModel"
_DOWN, _UP = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
_FIXED = {
    "act_fn": "silu",
    "norm_num_groups": 32,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "norm_type": "group",
}
_FIXED |= {"lookup_from_codebook": False, "shift_factor": None, "latents_mean": None, "latents_std": None}
_ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))


class StageLayout(NamedTuple):
    """All that names and diffusers' config depend on. `attention` has an entry for each level, full size first."""

    kind: str
    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    res_blocks: int  # in the encoder; one more in the decoder
    attention: tuple[bool, ...]
    middle_attention: bool
    z_channels: int
    embed_dim: int
    codes: int | None = None  # entries of the codebook

    @classmethod
    def from_params(cls, kind: str, params: Mapping[str, Any]) -> StageLayout:
        """From the `params` of a first stage in our YAML; kind: KL or VQ. InterchangeError for what diffusers has no class for."""
        dd = params["ddconfig"]
        mult = tuple(dd.get("ch_mult", (1, 2, 4, 8)))
        unlike = {
            "attn_type": dd.get("use_linear_attn") or dd.get("attn_type", "vanilla") not in ("vanilla", "none"),
            "resamp_with_conv": dd.get("resamp_with_conv", True) is not True,
            "tanh_out": bool(dd.get("tanh_out")),
            "give_pre_end": bool(dd.get("give_pre_end")),
        }
        for name in (name for name, differs in unlike.items() if differs):
            raise InterchangeError(
                f"ddconfig: {name} {dd.get(name)}: diffusers has no such first stage, so that it cannot be converted"
            )
        if params.get("remap"):
            raise InterchangeError(f"remap {params['remap']}: diffusers' VQModel has no such thing")
        if kind == KL and dd["z_channels"] != params["embed_dim"]:
            both = f"z_channels {dd['z_channels']}, embed_dim {params['embed_dim']}"
            raise InterchangeError(f"{both}: diffusers' AutoencoderKL has one number for both")
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
            codes=params["n_embed"] if kind == VQ else None,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> StageLayout:
        """From diffusers' config.json of an autoencoder; InterchangeError for one that this framework does not build."""
        kind = config.get("_class_name")
        if kind not in (KL, VQ):
            raise InterchangeError(f"config.json: a {kind}, where {KL} or {VQ} was expected")
        down, up = config["down_block_types"], config["up_block_types"]
        known = {name: bool(attends) for pair in (_DOWN, _UP) for attends, name in enumerate(pair)}
        for block in (*down, *up):
            if block not in known:
                raise InterchangeError(
                    f"config.json of {kind}: block type {block}: this framework's first stages have {', '.join(known)}"
                )
        if [known[name] for name in down] != [known[name] for name in reversed(up)]:
            raise InterchangeError(
                f"config.json of {kind}: attention at other levels in down_block_types {down} than in {up}"
            )
        for name, value in _FIXED.items():
            if config.get(name, value) != value:
                raise InterchangeError(
                    f"config.json of {kind}: {name} {config[name]}: this framework's first stages have no such part"
                )
        z_channels = config.get("latent_channels", 3 if kind == VQ else 4)
        return cls(
            kind=kind,
            in_channels=config.get("in_channels", 3),
            out_channels=config.get("out_channels", 3),
            channels=tuple(config["block_out_channels"]),
            res_blocks=config.get("layers_per_block", 1),
            attention=tuple(known[name] for name in down),
            middle_attention=bool(config.get("mid_block_add_attention", True)),
            z_channels=z_channels,
            embed_dim=(config.get("vq_embed_dim") or z_channels) if kind == VQ else z_channels,
            codes=config.get("num_vq_embeddings", 256) if kind == VQ else None,
        )

    def config(self, sample_size: int, scale_factor: float) -> dict[str, Any]:
        """diffusers' config.json; sample_size: the picture's side; scale_factor: of the diffusion model, 1 for a first stage alone."""
        config = {
            "_class_name": self.kind,
            "act_fn": "silu",
            "norm_num_groups": 32,
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
        if self.kind == VQ:
            config |= {"num_vq_embeddings": self.codes, "vq_embed_dim": self.embed_dim}
        return config

    def rules(self) -> list[Rule]:
        """The table of names. `decoder.up` is stored by size here, full size first, and in running order there."""
        last = len(self.channels) - 1
        rules = same("encoder.conv_in", "encoder.conv_in")
        width = self.channels[0]
        for level, channels in enumerate(self.channels):
            rules += self._level(f"encoder.down.{level}", f"encoder.down_blocks.{level}", level, width, self.res_blocks)
            if level != last:
                rules += same(
                    f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv"
                )
            width = channels
        rules += [*self._ends("encoder"), *self._middle("decoder"), *same("decoder.conv_in", "decoder.conv_in")]
        for position, (level, channels) in enumerate(reversed(list(enumerate(self.channels)))):
            rules += self._level(
                f"decoder.up.{level}", f"decoder.up_blocks.{position}", level, width, self.res_blocks + 1
            )
            if level:
                rules += same(f"decoder.up.{level}.upsample.conv", f"decoder.up_blocks.{position}.upsamplers.0.conv")
            width = channels
        rules += [*same("decoder.norm_out", "decoder.conv_norm_out"), *same("decoder.conv_out", "decoder.conv_out")]
        rules += [*same("quant_conv", "quant_conv"), *same("post_quant_conv", "post_quant_conv")]
        return rules + (same("quantize.embedding", "quantize.embedding", ("weight",)) if self.kind == VQ else [])

    def _level(self, ours: str, theirs: str, level: int, width: int, blocks: int) -> list[Rule]:
        rules = []
        for block in range(blocks):
            changes = block == 0 and width != self.channels[level]
            rules += _resnet(f"{ours}.block.{block}", f"{theirs}.resnets.{block}", changes)
            if self.attention[level]:
                rules += _attention(f"{ours}.attn.{block}", f"{theirs}.attentions.{block}")
        return rules

    def _middle(self, half: str) -> list[Rule]:
        attention = _attention(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0") if self.middle_attention else []
        first = _resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", False)
        return [*first, *attention, *_resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", False)]

    def _ends(self, half: str) -> list[Rule]:
        ends = [*same(f"{half}.norm_out", f"{half}.conv_norm_out"), *same(f"{half}.conv_out", f"{half}.conv_out")]
        return [*self._middle(half), *ends]


def _resnet(ours: str, theirs: str, shortcut: bool) -> list[Rule]:
    rules = [
        rule for layer in ("norm1", "conv1", "norm2", "conv2") for rule in same(f"{ours}.{layer}", f"{theirs}.{layer}")
    ]
    return rules + (same(f"{ours}.nin_shortcut", f"{theirs}.conv_shortcut") if shortcut else [])


def _attention(ours: str, theirs: str) -> list[Rule]:
    rules = same(f"{ours}.norm", f"{theirs}.group_norm")
    for here, there in _ATTENTION:
        rules += [Rule(f"{ours}.{here}.weight", (f"{theirs}.{there}.weight",), CONV2D)]
        rules += same(f"{ours}.{here}", f"{theirs}.{there}", ("bias",))
    return rules
