"""Stable Diffusion v2's text encoder and CLIP's joint space, on open_clip's model: names, numbers, tokens, weights."""

import pytest
import torch
from open_clip import get_model_config
from open_clip.model import CLIP
from torch import nn

from ldm.checkpoint import CheckpointError, ensure_weights, load_weights, weights_on_meta, write_weights
from ldm.modules.encoders.modules import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder, FrozenOpenCLIPEmbedder
from ldm.modules.encoders.tokenizers import clip_tokenizer
from tests.reference import randn, rel_error, seed_weights

TINY = {"width": 32, "heads": 2, "layers": 3, "embed_dim": 24}
VISION = {"image_size": 8, "layers": 1, "width": 64, "patch_size": 8}
TINY_JOINT = {
    "embed_dim": 16,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
}
TEXTS = ["a photograph of an astronaut riding a horse", "", "one two three " * 40]


def tiny(**params) -> FrozenOpenCLIPEmbedder:
    return FrozenOpenCLIPEmbedder(**{"text_config": TINY, "layer": "penultimate", **params})


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_the_same_encoding_within_their_rounding(dtype):
    model, half = seed_weights(tiny()), tiny().to(dtype)
    half.load_state_dict(model.state_dict())
    out = half.encode(TEXTS)
    assert out.dtype == dtype and rel_error(out.float(), model.encode(TEXTS)) < 3e-2


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


def test_it_is_frozen_by_default_and_unused_weights_are_never_trained():
    frozen = nn.Sequential(tiny()).train()
    assert not any(module.training for module in frozen[0].modules()) and not any(
        p.requires_grad for p in frozen.parameters()
    )
    model = tiny(freeze=False).train()
    assert model.training
    model.encode(["a horse"]).sum().backward()
    without_gradient = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without_gradient == [] and not model.model.transformer.resblocks[-1].attn.in_proj_weight.requires_grad


def test_it_loads_from_a_file_after_a_build_on_meta(tmp_path):
    source = nn.ModuleDict({"cond_stage_model": seed_weights(tiny())})
    write_weights(source.state_dict(), tmp_path / "a.safetensors")
    with weights_on_meta():
        other = nn.ModuleDict({"cond_stage_model": tiny()})
    assert all(p.is_meta for p in other.parameters())
    report = load_weights(other, tmp_path / "a.safetensors")
    ensure_weights(other)
    assert report.missing == () and report.unexpected == () and not any(buffer.is_meta for buffer in other.buffers())
    assert torch.equal(other.cond_stage_model.encode(TEXTS), source.cond_stage_model.encode(TEXTS))


def test_a_file_may_omit_unused_weights_only(tmp_path):
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


def test_weights_come_from_a_local_file_or_folder_if_no_checkpoint_had_them(tmp_path, no_hub):
    source = seed_weights(tiny())
    write_weights({**source.model.state_dict(), "visual.proj": torch.ones(1)}, tmp_path / "open_clip_model.safetensors")
    for place in (tmp_path, tmp_path / "open_clip_model.safetensors"):
        model = tiny(version=str(place))
        model.load_pretrained()
        assert torch.equal(model.encode(TEXTS), source.encode(TEXTS))
    write_weights({"positional_embedding": torch.ones(2)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"42 of 42 weights of the encoder are missing or differ in shape: positional_embedding"
    ):
        model.load_pretrained()


def test_missing_weights_are_one_clear_line(tmp_path, no_hub):
    with pytest.raises(CheckpointError, match=r"CLIP-ViT-H-14-laion2B-s32B-b79K .*the download failed.*local file"):
        tiny().load_pretrained()
    with pytest.raises(CheckpointError, match=r"version 'nowhere': not a file or folder, .*laion2b_s32b_b79k"):
        tiny(version="nowhere").load_pretrained()
    with pytest.raises(CheckpointError, match=r"contains none of open_clip_model\.safetensors"):
        tiny(version=str(tmp_path)).load_pretrained()


@pytest.mark.parametrize(
    "params, words",
    [
        ({"layer": "middle"}, "layer 'middle': choose one of last, penultimate"),
        ({"arch": "ViT-Z"}, "arch 'ViT-Z': choose one of ViT-H-14"),
        ({"max_length": 78}, "max_length 78: choose 2 to 77"),
        ({"text_config": {"depth": 1}}, "text_config: depth: not one of context_length"),
        ({"text_config": {"width": 30, "heads": 4}}, "width 30 is not a multiple of heads 4"),
    ],
)
def test_invalid_parameters_are_refused_while_building(params, words):
    with pytest.raises(ValueError, match=words):
        tiny(**params)


def text(**kwargs):
    return FrozenCLIPTextEmbedder(clip_config=TINY_JOINT, **kwargs)


def image(**kwargs):
    return FrozenClipImageEmbedder(clip_config=TINY_JOINT, **kwargs)


@pytest.mark.parametrize("name, unused_tower", [("Text", "model.visual."), ("Image", "model.transformer.")])
def test_joint_embedders_build_on_meta_with_their_own_tower_only(name, unused_tower):
    with torch.device("meta"):
        model = {"Text": FrozenCLIPTextEmbedder, "Image": FrozenClipImageEmbedder}[name]()
    assert all(p.is_meta and not p.requires_grad for p in model.parameters()) and model.finds_own_weights
    assert not any(key.startswith(unused_tower) for key in model.state_dict())
    assert model.width == 768


def test_texts_become_unit_vectors_repeated():
    model = seed_weights(text(n_repeat=3))
    out = model.encode(["a horse", "", "a horse"])
    assert out.shape == (3, 3, 16) and torch.allclose(out.norm(dim=-1), torch.ones(3, 3), atol=1e-5)
    assert torch.allclose(out[0], out[2], atol=1e-6) and not torch.allclose(out[0], out[1], atol=1e-3)


def test_a_vector_depends_on_the_whole_text_up_to_its_end():
    model = seed_weights(text())
    out = model(["a red horse", "a red house", "a red horse"])
    assert not torch.allclose(out[0], out[1], atol=1e-4)


def test_images_of_any_size_become_one_vector_each():
    model = seed_weights(image())
    x = torch.tanh(randn(1, 2, 3, 40, 24))
    assert model(x).shape == (2, 16) and model.encode(x).shape == (2, 1, 16)
    assert torch.allclose(seed_weights(image(normalize=True))(x).norm(dim=-1), torch.ones(2), atol=1e-5)


def test_images_are_normalized_as_in_clips_training():
    gray = image().preprocess(torch.zeros(1, 3, 8, 8))
    assert gray.shape == (1, 3, 16, 16)
    wanted = torch.tensor(
        [(0.5 - 0.48145466) / 0.26862954, (0.5 - 0.4578275) / 0.26130258, (0.5 - 0.40821073) / 0.27577711]
    )
    assert torch.allclose(gray[0, :, 5, 5], wanted, atol=1e-5)


def test_joint_embedders_stay_in_evaluation_mode():
    parent = nn.Sequential(text(), image()).train()
    assert not any(module.training for child in parent for module in child.modules())


def test_joint_weights_come_from_a_file_after_a_build_on_meta(tmp_path):
    source = seed_weights(text())
    path = tmp_path / "clip.safetensors"
    write_weights({name.removeprefix("model."): tensor for name, tensor in source.state_dict().items()}, path)
    with torch.device("meta"):
        model = text(weights=str(path))
    ensure_weights(nn.ModuleList([model]))
    assert torch.allclose(model(["a horse"]), source(["a horse"]), atol=1e-6)


def test_a_checkpoint_that_holds_the_weights_is_enough(tmp_path):
    source, path = nn.ModuleDict({"cond_stage_model": seed_weights(image())}), tmp_path / "all.ckpt"
    write_weights(source.state_dict(), path)
    parent = nn.ModuleDict({"cond_stage_model": image(weights="nowhere.safetensors")})
    load_weights(parent, path)
    ensure_weights(parent)
    x = randn(2, 1, 3, 16, 16)
    assert torch.equal(parent["cond_stage_model"](x), source["cond_stage_model"](x))


def test_a_file_of_another_shape_is_refused(tmp_path):
    path = tmp_path / "clip.safetensors"
    write_weights({"ln_final.weight": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="are missing or differ in shape"):
        text(weights=str(path)).ensure_weights()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FrozenCLIPTextEmbedder("ViT-X/99"), "choose one of ViT-B/32"),
        (lambda: text(max_length=20), "exactly 77 tokens"),
        (lambda: image(jit=True), "run code from the file"),
    ],
)
def test_joint_embedders_refuse_invalid_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()
