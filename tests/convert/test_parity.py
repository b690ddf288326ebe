"""The parity check: a wrong table of names or config never reaches the disk, and the tables name every weight of the published models."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint.diffusers import first_stage, rules, text, unet
from ldm.checkpoint.diffusers.plan import plan_of
from ldm.checkpoint.diffusers.rules import ConversionError, Form, Rule
from ldm.convert.convert import to_folder
from ldm.inference.settings import read_config
from ldm.util import instantiate_from_config
from tests.convert.models import MODELS, save
from tests.tiny import SavedModel, text_model_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made: dict[str, SavedModel] = {}
    root = tmp_path_factory.mktemp("parity")

    def make(kind: str) -> SavedModel:
        made.setdefault(kind, save(root / kind, kind)) if kind not in made else None
        return made[kind]

    return make


def swapped(table: list[Rule], one: str, other: str) -> list[Rule]:
    """The table with two published tensors exchanged."""
    names = {one: other, other: one}
    assert {one, other} <= {rule.ours for rule in table}
    return [rule._replace(ours=names.get(rule.ours, rule.ours)) for rule in table]


def formed(table: list[Rule], name: str, form: Form) -> list[Rule]:
    """The table with another form for one published tensor."""
    assert name in {rule.ours for rule in table}
    return [rule._replace(form=form) if rule.ours == name else rule for rule in table]


_TURNED = Form(lambda tensor: [tensor.flatten(1).t()], lambda parts: parts[0].t()[:, :, None, None])
_IN, _OUT, _BLOCK = "in_layers.2.weight", "out_layers.3.bias", "input_blocks.3.1.transformer_blocks.0"
FAULTS = {
    "query and key": ("unet", lambda t: swapped(t, f"{_BLOCK}.attn1.to_q.weight", f"{_BLOCK}.attn1.to_k.weight")),
    "key and value": ("unet", lambda t: swapped(t, f"{_BLOCK}.attn2.to_k.weight", f"{_BLOCK}.attn2.to_v.weight")),
    "norms of a block": ("unet", lambda t: swapped(t, f"{_BLOCK}.norm1.weight", f"{_BLOCK}.norm3.weight")),
    "blocks of a level": ("unet", lambda t: swapped(t, f"output_blocks.2.0.{_OUT}", f"output_blocks.3.0.{_OUT}")),
    "blocks of the middle": ("unet", lambda t: swapped(t, f"middle_block.0.{_IN}", f"middle_block.2.{_IN}")),
    "time embedding": ("unet", lambda t: swapped(t, "time_embed.0.bias", "time_embed.2.bias")),
    "a weight left out": ("unet", lambda t: [rule for rule in t if rule.ours != "out.0.bias"]),
    "decoder upside down": (
        "vae",
        lambda t: swapped(t, "decoder.up.0.block.0.conv2.bias", "decoder.up.1.block.0.conv2.bias"),
    ),
    "attention turned": ("vae", lambda t: formed(t, "encoder.mid.attn_1.v.weight", _TURNED)),
    "layers of the text": (
        "text",
        lambda t: swapped(t, *(f"text_model.encoder.layers.{n}.mlp.fc1.bias" for n in (0, 1))),
    ),
    "heads of qkv": ("plain", lambda t: formed(t, "input_blocks.1.1.qkv.bias", rules.STACKED)),
}
LAYOUTS = {"unet": unet.UNetLayout, "plain": unet.UNetLayout, "vae": first_stage.StageLayout, "text": text.TextLayout}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_table_of_names_is_caught_and_nothing_is_written(saved, tmp_path, monkeypatch, fault):
    part, break_ = FAULTS[fault]
    kind, layout = "unconditional" if part == "plain" else "sd1", LAYOUTS[part]
    right = layout.rules
    monkeypatch.setattr(layout, "rules", lambda self: break_(right(self)))
    with pytest.raises(ConversionError, match=r"parity check failed.*nothing was written"):
        to_folder(read_config(saved(kind).config), saved(kind).ckpt, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


CONFIG_FAULTS = {
    "number of heads": ("sd1", {"attention_head_dim": 4}),
    "width of heads": ("unconditional", {"attention_head_dim": 8}),
    "eps": ("sd1", {"norm_eps": 1e-2}),
    "levels with attention": ("sd1", {"down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]}),
    "layers": ("sd1", {"layers_per_block": 2}),
    "projection": ("sd2", {"use_linear_projection": False}),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_wrong_config_is_caught_and_nothing_is_written(saved, tmp_path, monkeypatch, fault):
    kind, change = CONFIG_FAULTS[fault]
    right = unet.UNetLayout.config
    monkeypatch.setattr(unet.UNetLayout, "config", lambda self, size: {**right(self, size), **change})
    with pytest.raises(ConversionError, match=r"parity check failed.*nothing was written"):
        to_folder(read_config(saved(kind).config), saved(kind).ckpt, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_the_check_leaves_the_callers_random_numbers_alone(saved, tmp_path):
    stage = saved("kl")
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    to_folder(read_config(stage.config), stage.ckpt, tmp_path / "folder")
    assert torch.equal(torch.randn(2), expected)


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
def test_the_tables_name_every_weight_of_a_published_model_once(path):
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


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("kernel", [0, 1])
def test_queries_keys_and_values_are_split_by_head_and_joined_again(heads, kernel):
    tensor = torch.randn(24, 8, 1) if kernel else torch.randn(24)
    parts = rules.by_head(heads, kernel).split(tensor)
    assert [part.shape for part in parts] == ([(8, 8)] * 3 if kernel else [(8,)] * 3)
    assert torch.equal(rules.by_head(heads, kernel).join(parts), tensor)
    width = 8 // heads
    second_key = tensor[
        3 * width + width if heads > 1 else width
    ]  # first row of the last key that a stacking would misplace
    assert torch.equal(parts[1][width if heads > 1 else 0], second_key.flatten() if kernel else second_key)


def test_every_kind_of_model_is_covered():
    pipelines = {plan_of(text_model_config(**params)).pipeline for params in MODELS.values()}
    assert pipelines == {"StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "LDMPipeline", None}
