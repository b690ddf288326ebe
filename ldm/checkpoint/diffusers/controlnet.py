"""The ControlNet: its layout, from our YAML or from diffusers' config.json, and what follows from that.

Its copy of the UNet's contracting half has the UNet's rules (`ldm.checkpoint.diffusers.unet`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm.checkpoint.diffusers.rules import ConversionError, Rule, check_supported, same
from ldm.checkpoint.diffusers.unet import CROSS, UNetLayout
from ldm.config.consistency import HINT_BLOCK_CHANNELS

CONTROLNET = "ControlNetModel"
_COPIED = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.")
_NOT_COPIED = (
    *("sample_size", "out_channels", "up_block_types", "center_input_sample", "dual_cross_attention"),
    "mid_block_only_cross_attention",
)
_SUPPORTED = {
    **{"controlnet_conditioning_channel_order": "rgb", "mid_block_type": "UNetMidBlock2DCrossAttn"},
    **{"encoder_hid_dim_type": None},
}


class ControlNetLayout(NamedTuple):
    """All that names and diffusers' config depend on."""

    copied: UNetLayout  # of the UNet; its expanding half is not part of a ControlNet
    hint_channels: int
    hint_widths: tuple[int, ...]

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> ControlNetLayout:
        """From the `params` of a ControlNet in our YAML; ConversionError for one that diffusers does not support."""
        copied = UNetLayout.from_params({**params, "out_channels": params["in_channels"]})
        if copied.kind != CROSS:
            raise ConversionError(f"control_stage_config: diffusers' {CONTROLNET} needs use_spatial_transformer: true")
        if len(set(copied.res_blocks)) > 1:
            numbers = f"control_stage_config: num_res_blocks {list(copied.res_blocks)}"
            raise ConversionError(f"{numbers}: diffusers' {CONTROLNET} supports one number for all levels")
        return cls(copied, params["hint_channels"], tuple(params.get("hint_block_channels") or HINT_BLOCK_CHANNELS))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ControlNetLayout:
        """From diffusers' config.json; ConversionError for a ControlNet that this framework does not build."""
        check_supported("config.json", config, _SUPPORTED)
        expanding = [block.replace("Down", "Up") for block in reversed(config["down_block_types"])]
        whole = {"in_channels": 4, **config, "_class_name": CROSS, "up_block_types": expanding}
        copied = UNetLayout.from_config({**whole, "out_channels": whole["in_channels"]})
        widths = tuple(config.get("conditioning_embedding_out_channels") or HINT_BLOCK_CHANNELS)
        return cls(copied, config.get("conditioning_channels", 3), widths)

    def config(self, global_average_pooling: bool = False) -> dict[str, Any]:
        """diffusers' config.json."""
        copied = {name: value for name, value in self.copied.config(0).items() if name not in _NOT_COPIED}
        return {
            **copied,
            "_class_name": CONTROLNET,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "conditioning_channels": self.hint_channels,
            "conditioning_embedding_out_channels": list(self.hint_widths),
            "controlnet_conditioning_channel_order": "rgb",
            "global_pool_conditions": global_average_pooling,
        }

    def rules(self) -> list[Rule]:
        """Every tensor's rule: the copy's, then those of the hint's convolutions and of the zero convolutions."""
        rules = [rule for rule in self.copied.rules() if rule.ours.startswith(_COPIED)]
        theirs = [f"blocks.{k}" for k in range(2 * (len(self.hint_widths) - 1))]
        for k, name in enumerate(("conv_in", *theirs, "conv_out")):  # an activation between two of them
            rules += same(f"input_hint_block.{2 * k}", f"controlnet_cond_embedding.{name}")
        levels = len(self.copied.channels)
        outputs = 1 + sum(self.copied.res_blocks) + levels - 1
        for k in range(outputs):
            rules += same(f"zero_convs.{k}.0", f"controlnet_down_blocks.{k}")
        return [*rules, *same("middle_block_out.0", "controlnet_mid_block")]
