"""The parity check: a wrong table of names or config never reaches the disk."""

import pytest
import torch

from ldm.checkpoint.diffusers import first_stage, rules, text, unet
from ldm.checkpoint.diffusers.rules import ConversionError, Form, Rule
from ldm.config.model_info import read_config
from ldm.convert.convert import to_folder


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
def test_a_wrong_table_of_names_is_caught_and_nothing_is_written(converted, tmp_path, monkeypatch, fault):
    part, break_ = FAULTS[fault]
    kind, layout = "unconditional" if part == "plain" else "sd1", LAYOUTS[part]
    right = layout.rules
    monkeypatch.setattr(layout, "rules", lambda self: break_(right(self)))
    with pytest.raises(ConversionError, match=r"parity check failed.*nothing was written"):
        to_folder(read_config(converted(kind)[0].config), converted(kind)[0].ckpt, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_named(converted, tmp_path):
    saved, name = converted("sd1")[0], "decoder.conv_in.weight"
    content = torch.load(saved.ckpt, weights_only=True)
    content["state_dict"][f"first_stage_model.{name}"].fill_(float("nan"))
    torch.save(content, tmp_path / "nan.ckpt")
    with pytest.raises(ConversionError, match=f"{name} has values that are not finite; nothing was written"):
        to_folder(read_config(saved.config), tmp_path / "nan.ckpt", tmp_path / "folder")


CONFIG_FAULTS = {
    "number of heads": ("sd1", {"attention_head_dim": 4}),
    "width of heads": ("unconditional", {"attention_head_dim": 8}),
    "eps": ("sd1", {"norm_eps": 1e-2}),
    "levels with attention": ("sd1", {"down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]}),
    "layers": ("sd1", {"layers_per_block": 2}),
    "projection": ("sd2", {"use_linear_projection": False}),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_wrong_config_is_caught_and_nothing_is_written(converted, tmp_path, monkeypatch, fault):
    kind, change = CONFIG_FAULTS[fault]
    right = unet.UNetLayout.config
    monkeypatch.setattr(unet.UNetLayout, "config", lambda self, size: {**right(self, size), **change})
    with pytest.raises(ConversionError, match=r"parity check failed.*nothing was written"):
        to_folder(read_config(converted(kind)[0].config), converted(kind)[0].ckpt, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_the_check_leaves_the_callers_random_numbers_alone(converted, tmp_path):
    stage, _ = converted("kl")
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    to_folder(read_config(stage.config), stage.ckpt, tmp_path / "folder")
    assert torch.equal(torch.randn(2), expected)
