"""The layout of a ControlNet in diffusers: names, config and what is refused."""

import pytest

from ldm.checkpoint.diffusers.controlnet import ControlNetLayout
from ldm.checkpoint.diffusers.plan import plan_of
from ldm.checkpoint.diffusers.rules import ConversionError, first_difference
from ldm.config.files import load_yaml
from ldm.paths import ROOT


def published(name: str) -> dict:
    return load_yaml(ROOT / "configs" / "controlnet" / f"{name}.yaml").model.params.control_stage_config.params


def test_the_published_controlnets_have_the_config_of_diffusers():
    """lllyasviel/sd-controlnet-canny and thibaud/controlnet-sd21-canny-diffusers."""
    config = ControlNetLayout.from_params(published("cldm_v15")).config()
    expected = {"_class_name": "ControlNetModel", "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2}
    expected |= {"attention_head_dim": 8, "cross_attention_dim": 768, "use_linear_projection": False}
    expected |= {"conditioning_embedding_out_channels": [16, 32, 96, 256], "in_channels": 4}
    expected |= {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "act_fn": "silu"}
    assert {name: config[name] for name in expected} == expected
    assert not {"out_channels", "up_block_types", "sample_size"} & set(config)
    v21 = ControlNetLayout.from_params(published("cldm_v21")).config()
    assert (v21["attention_head_dim"], v21["use_linear_projection"]) == ([5, 10, 20, 20], True)


@pytest.mark.parametrize("name", ["cldm_v15", "cldm_v21"])
def test_a_layout_is_the_same_from_both_configs(name):
    layout = ControlNetLayout.from_params(published(name))
    assert ControlNetLayout.from_config(layout.config()) == layout
    names = {rule.ours for rule in layout.rules()}
    assert (
        len(names) == 340 and {"zero_convs.11.0.weight", "input_hint_block.14.bias", "middle_block_out.0.bias"} <= names
    )


def test_the_component_of_a_control_ldm_is_its_controlnet():
    (part,) = plan_of({"model": load_yaml(ROOT / "configs" / "controlnet" / "cldm_v15.yaml").model}).components
    assert part.prefix == "control_model." and part.name == "ControlNetModel"


def test_what_diffusers_or_this_framework_does_not_build_is_refused():
    layout = ControlNetLayout.from_params(published("cldm_v15"))
    with pytest.raises(ConversionError, match="one number for all levels"):
        ControlNetLayout.from_params({**published("cldm_v15"), "num_res_blocks": [1, 2, 2, 2]})
    with pytest.raises(ConversionError, match="controlnet_conditioning_channel_order bgr is not supported"):
        ControlNetLayout.from_config({**layout.config(), "controlnet_conditioning_channel_order": "bgr"})
    other = ControlNetLayout.from_params(published("cldm_v21"))
    assert first_difference(layout, other) == "heads is (5, 10, 20, None), but (8, 8, 8, None) in the YAML"
