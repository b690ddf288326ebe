"""Stable Diffusion v2's text encoder against open_clip's own tower: names, numbers, tokens, weights."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from ldm.checkpoint import CheckpointError, ensure_weights, load_weights, weights_on_meta, write_weights
from ldm.modules.encoders.clip_tokenizer import clip_tokenizer
from ldm.modules.encoders.modules import FrozenOpenCLIPEmbedder
from ldm.util import instantiate_from_config
from tests.reference import seed_weights

TINY = {"width": 32, "heads": 2, "layers": 3, "embed_dim": 24}
VISION = {"image_size": 8, "layers": 1, "width": 64, "patch_size": 8}
TEXTS = ["a photograph of an astronaut riding a horse", "", "one two three " * 40]


def tiny(**params) -> FrozenOpenCLIPEmbedder:
    return FrozenOpenCLIPEmbedder(**{"text_config": TINY, "layer": "penultimate", **params})


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))


def test_names_and_shapes_are_those_of_the_released_files():
    with torch.device("meta"):
        model = FrozenOpenCLIPEmbedder(layer="penultimate")
    have = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wanted = {
        "model.positional_embedding": (77, 1024),
        "model.text_projection": (1024, 1024),
        "model.logit_scale": (),
        "model.token_embedding.weight": (49408, 1024),
        "model.ln_final.weight": (1024,),
        "model.ln_final.bias": (1024,),
    }
    for n in range(24):
        block = {
            "attn.in_proj": ((3072, 1024), (3072,)),
            "attn.out_proj": ((1024, 1024), (1024,)),
            "mlp.c_fc": ((4096, 1024), (4096,)),
            "mlp.c_proj": ((1024, 4096), (1024,)),
            "ln_1": ((1024,), (1024,)),
            "ln_2": ((1024,), (1024,)),
        }
        for name, (weight, bias) in block.items():
            joint = "_" if name == "attn.in_proj" else "."
            wanted[f"model.transformer.resblocks.{n}.{name}{joint}weight"] = weight
            wanted[f"model.transformer.resblocks.{n}.{name}{joint}bias"] = bias
    assert have == wanted and len(have) == 294
    assert sum(value.numel() for value in model.state_dict().values()) == 354_032_641


@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_the_numbers_are_open_clips(layer):
    from open_clip import get_model_config
    from open_clip.model import CLIP

    config = get_model_config("ViT-H-14")
    assert not config.get("quick_gelu")
    text = {**config["text_cfg"], **{name: value for name, value in TINY.items() if name != "embed_dim"}}
    theirs = seed_weights(CLIP(embed_dim=TINY["embed_dim"], vision_cfg=VISION, text_cfg=text)).eval()
    del theirs.visual
    ours = tiny(layer=layer)
    ours.model.load_state_dict(theirs.state_dict(), strict=True)
    tokens = clip_tokenizer()(TEXTS, pad_id=0)
    with torch.no_grad():
        index = TINY["layers"] - 1 - ours.skip_last
        x = theirs.token_embedding(tokens) + theirs.positional_embedding
        for block in theirs.transformer.resblocks[: index + 1]:
            x = block(x, attn_mask=theirs.attn_mask)
        expected = theirs.ln_final(x)
        out = ours.encode(TEXTS)
    assert out.shape == (3, 77, 32) and torch.allclose(out, expected, atol=1e-5)


def test_padding_is_zero_and_the_batch_does_not_mix():
    model = seed_weights(tiny())
    texts = ["a horse", "a cat", ""]
    together = model.encode(texts)
    assert all(
        torch.allclose(model.encode([text]), row[None], atol=1e-5) for text, row in zip(texts, together, strict=True)
    )
    tokens = clip_tokenizer()(["a horse"], pad_id=0)
    assert tokens[0, 4:].eq(0).all() and torch.allclose(model.encode_tokens(tokens), together[:1], atol=1e-5)
    assert model.unconditional_input(2) == ["", ""]


def test_it_is_frozen_unless_asked_otherwise_and_what_is_unused_never_learns():
    frozen = nn.Sequential(tiny()).train()
    assert not any(module.training for module in frozen[0].modules()) and not any(
        p.requires_grad for p in frozen.parameters()
    )
    model = tiny(freeze=False).train()
    assert model.training
    model.encode(["a horse"]).sum().backward()
    waiting = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert waiting == [] and not model.model.transformer.resblocks[-1].attn.in_proj_weight.requires_grad


def test_it_is_filled_from_a_file_where_it_was_built_without_memory(tmp_path):
    source = nn.ModuleDict({"cond_stage_model": seed_weights(tiny())})
    write_weights(source.state_dict(), tmp_path / "a.safetensors")
    with weights_on_meta():
        other = nn.ModuleDict({"cond_stage_model": tiny()})
    assert all(p.is_meta for p in other.parameters())
    report = load_weights(other, tmp_path / "a.safetensors")
    ensure_weights(other)
    assert report.missing == () and report.unexpected == () and not any(True for _ in other.buffers())
    assert torch.equal(other.cond_stage_model.encode(TEXTS), source.cond_stage_model.encode(TEXTS))


def test_a_file_may_lack_what_is_never_used_and_nothing_else(tmp_path):
    source = seed_weights(tiny())
    unused = ("model.text_projection", "model.logit_scale", "model.transformer.resblocks.2.")
    weights = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith(unused)}
    write_weights(weights, tmp_path / "a.safetensors")
    with weights_on_meta():
        model = tiny()
    load_weights(model, tmp_path / "a.safetensors")
    model.ensure_weights()
    assert not any(p.is_meta for p in model.parameters()) and torch.equal(model.encode(TEXTS), source.encode(TEXTS))
    with weights_on_meta():
        last = tiny(layer="last")
    load_weights(last, tmp_path / "a.safetensors")
    last.ensure_weights()
    assert all(p.is_meta for p in last.model.transformer.resblocks[2].parameters()), "the last layer is used there"


def test_weights_come_from_a_local_file_or_folder_where_no_checkpoint_had_them(tmp_path, no_hub):
    source = seed_weights(tiny())
    write_weights({**source.model.state_dict(), "visual.proj": torch.ones(1)}, tmp_path / "open_clip_model.safetensors")
    for place in (tmp_path, tmp_path / "open_clip_model.safetensors"):
        model = tiny(version=str(place))
        model.load_pretrained()
        assert torch.equal(model.encode(TEXTS), source.encode(TEXTS))
    write_weights({"positional_embedding": torch.ones(2)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"42 of 42 weights of the text model are missing or differ: positional_embedding"
    ):
        model.load_pretrained()


def test_weights_that_are_nowhere_to_be_had_are_one_clear_line(tmp_path, no_hub):
    with pytest.raises(CheckpointError, match=r"CLIP-ViT-H-14-laion2B-s32B-b79K .*not to be downloaded.*local file"):
        tiny().load_pretrained()
    with pytest.raises(
        CheckpointError, match=r"version 'nowhere': neither a file or folder nor one of laion2b_s32b_b79k"
    ):
        tiny(version="nowhere").load_pretrained()
    with pytest.raises(CheckpointError, match=r"holds none of open_clip_model\.safetensors"):
        tiny(version=str(tmp_path)).load_pretrained()


@pytest.mark.parametrize(
    "params, words",
    [
        ({"layer": "middle"}, "layer 'middle': choose one of last, penultimate"),
        ({"arch": "ViT-Z"}, "arch 'ViT-Z': choose one of ViT-H-14"),
        ({"max_length": 78}, "max_length 78: from 2 to 77"),
        ({"text_config": {"depth": 1}}, "text_config: depth: not one of context_length"),
        ({"text_config": {"width": 30, "heads": 4}}, "width 30 is no multiple of heads 4"),
    ],
)
def test_what_cannot_be_built_is_refused(params, words):
    with pytest.raises(ValueError, match=words):
        tiny(**params)


def test_the_published_config_builds_and_open_clip_stays_unimported():
    code = (
        "import sys; from ldm.util import instantiate_from_config; model = instantiate_from_config({'target': "
        "'ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder', 'params': {'freeze': True, 'layer': 'penultimate', 'text_config': "
        "{'width': 8, 'heads': 1, 'layers': 2}}}); model(['a']); assert 'open_clip' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert isinstance(
        instantiate_from_config(
            {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": {"text_config": TINY}}
        ),
        FrozenOpenCLIPEmbedder,
    )
