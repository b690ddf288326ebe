"""The plan of a conversion: every published weight has one rule, and unsupported models are refused."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint.diffusers import text
from ldm.checkpoint.diffusers.plan import plan_of
from ldm.checkpoint.diffusers.rules import ConversionError
from ldm.config.model_info import read_config
from ldm.util import instantiate_from_config
from tests.convert.models import MODELS
from tests.tiny import text_model_config

ROOT = Path(__file__).parents[3]


SHIPPED = [
    "configs/stable-diffusion/v1-inference.yaml",
    "configs/stable-diffusion/v2-inference-v.yaml",
    "configs/latent-diffusion/celebahq-ldm-vq-4.yaml",
    "configs/latent-diffusion/cin-ldm-vq-f8.yaml",
    "models/first_stage_models/kl-f16/config.yaml",
    "models/first_stage_models/vq-f4-noattn/config.yaml",
    "models/ldm/bsr_sr/config.yaml",
]


PLACES = {"model.diffusion_model.": "unet_config", "first_stage_model.": "first_stage_config"}
PLACES |= dict.fromkeys(text.PREFIX.values(), "cond_stage_config")


@pytest.mark.parametrize("path", SHIPPED)
def test_every_weight_of_a_published_model_has_one_rule(path):
    config = read_config(ROOT / path)
    for part in plan_of(config).components:
        node = config.model.params[PLACES[part.prefix]] if part.prefix else config.model
        node = OmegaConf.create({"target": node.target, "params": {**(node.get("params") or {})}})
        node.params.pop("ckpt_path", None)
        if "lossconfig" in node.params:
            node.params.lossconfig = {"target": "torch.nn.Identity"}
        with torch.device("meta"):
            module = instantiate_from_config(node)
        inner = part.prefix.removeprefix("cond_stage_model.") if isinstance(part.layout, text.TextLayout) else ""
        names = {name.removeprefix(inner) for name in module.state_dict() if not name.endswith("position_ids")}
        ours = [rule.ours for rule in part.layout.rules()]
        unused: set[str] = set()
        if isinstance(part.layout, text.TextLayout) and part.layout.kind == text.OPEN_CLIP:
            last = f"transformer.resblocks.{part.layout.layers}."  # skipped by the penultimate layer's output
            unused = {"text_projection", "logit_scale", *(name for name in names if name.startswith(last))}
        assert len(ours) == len(set(ours)) and {*ours, *unused} == names
        theirs = [name for rule in part.layout.rules() for name in rule.theirs]
        assert len(theirs) == len(set(theirs))
        assert type(part.layout).from_config(part.config) == part.layout, (
            "the config says the layout that it was made from"
        )


def test_every_kind_of_model_is_covered():
    pipelines = {plan_of(text_model_config(**params)).pipeline for params in MODELS.values()}
    stable = {f"StableDiffusion{name}Pipeline" for name in ("", "Inpaint", "InstructPix2Pix")}
    assert pipelines == {*stable, "LDMPipeline", None}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"resblock_updown": True}, "resblock_updown True"),
        ({"use_new_attention_order": True}, "use_new_attention_order True"),
        (
            {"num_head_channels": -1, "num_heads": 2, "channel_mult": [1, 2], "attention_resolutions": [1, 2]},
            "16, 32 channels wide",
        ),
        ({"channel_mult": [2, 4]}, "must begin with 1"),
        ({"conv_resample": False}, "conv_resample False"),
    ],
)
def test_a_unet_that_diffusers_does_not_support_is_refused(changes, says):
    config = OmegaConf.create({"model": {"params": {**MODELS["unconditional"]}}})
    config.model.params.unet_config.params.update(changes)
    with pytest.raises(ConversionError, match=says):
        plan_of(config)
