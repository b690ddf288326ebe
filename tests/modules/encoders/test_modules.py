"""Laws of the condition encoders: published names and figures, no network while building, a clear word where something is missing."""

import gzip
import json
import logging

import numpy as np
import pytest
import torch
from torch import nn

from ldm.checkpoint import CheckpointError, ensure_weights, load_weights, write_weights
from ldm.config.text_shapes import VIT_L_14
from ldm.modules.encoders.clip_text import CLIPText
from ldm.modules.encoders.modules import (
    BERTEmbedder,
    CaptionEmbedder,
    ClassEmbedder,
    FrozenCLIPEmbedder,
    HashedEmbedding,
    SpatialRescaler,
    TransformerEmbedder,
)
from tests.reference import GOLDEN, TOLERANCE, make, rel_error, seed_weights

TINY_CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def no_hub(monkeypatch):
    """As on a machine without network and cache, at once."""
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)


# --------------------------------------------------------------------------------------------------------- figures


def test_transformer_embedder_gives_the_published_figures():
    tokens = make({"kind": "int", "shape": [2, 12], "seed": 21, "low": 0, "high": 100})
    model = seed_weights(TransformerEmbedder(n_embed=64, n_layer=2, vocab_size=100, max_seq_len=12, device="cpu"))
    with torch.no_grad():
        assert rel_error(model(tokens), np.load(GOLDEN / "modules/transformer_embedder.npz")["out0"]) < TOLERANCE


def test_spatial_rescaler_gives_the_published_figures():
    x = make({"shape": [2, 5, 16, 16], "seed": 22})
    model = seed_weights(SpatialRescaler(n_stages=2, in_channels=5, out_channels=3))
    with torch.no_grad():
        assert rel_error(model.encode(x), np.load(GOLDEN / "modules/spatial_rescaler.npz")["out0"]) < TOLERANCE


def test_clip_agrees_with_transformers():
    from transformers import CLIPTextConfig, CLIPTextModel

    shape = {**VIT_L_14, **TINY_CLIP}
    ours = seed_weights(CLIPText(**shape))
    theirs = CLIPTextModel(CLIPTextConfig(**shape, bos_token_id=49406, eos_token_id=49407)).eval()
    flat = {
        name.removeprefix("text_model."): value
        for name, value in ours.state_dict().items()
        if "position_ids" not in name
    }
    nested = next(iter(theirs.state_dict())).startswith("text_model.")
    theirs.load_state_dict({("text_model." if nested else "") + name: value for name, value in flat.items()})
    tokens = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert rel_error(ours(tokens), theirs(tokens).last_hidden_state) < 1e-6


# ---------------------------------------------------------------------------------------------------- published names


def test_clip_has_the_names_and_shapes_of_stable_diffusion_v1():
    with gzip.open(GOLDEN / "manifests/stable-diffusion-v1.json.gz") as file:
        manifest = json.load(file)["configs/stable-diffusion/v1-inference.yaml"]
    wanted = {
        name.removeprefix("cond_stage_model."): shape
        for name, shape in manifest.items()
        if name.startswith("cond_stage_model.")
    }
    with torch.device("meta"):
        model = FrozenCLIPEmbedder()
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == wanted


@pytest.mark.parametrize(  # published: txt2img-1p4B-eval.yaml, models/ldm/{text2img256,layout2img-openimages256}/config.yaml
    ("params", "count"),
    [
        ({"n_embed": 1280, "n_layer": 32}, 422),
        ({"n_embed": 640, "n_layer": 32}, 422),
        ({"n_embed": 512, "n_layer": 16, "vocab_size": 8192, "max_seq_len": 92, "use_tokenizer": False}, 214),
    ],
)
def test_bert_embedder_has_the_published_names_and_shapes(params, count):
    with torch.device("meta"):
        have = {name: tuple(value.shape) for name, value in BERTEmbedder(**params).state_dict().items()}
    width, vocabulary = params["n_embed"], params.get("vocab_size", 30522)
    assert len(have) == count
    for name, shape in {
        "transformer.token_emb.weight": (vocabulary, width),
        "transformer.pos_emb.emb.weight": (params.get("max_seq_len", 77), width),
        "transformer.attn_layers.layers.0.0.weight": (width,),
        "transformer.attn_layers.layers.0.1.to_q.weight": (512, width),
        "transformer.attn_layers.layers.0.1.to_out.weight": (width, 512),
        "transformer.attn_layers.layers.0.1.to_out.bias": (width,),
        "transformer.attn_layers.layers.1.1.net.0.0.weight": (4 * width, width),
        "transformer.attn_layers.layers.1.1.net.2.weight": (width, 4 * width),
        "transformer.norm.bias": (width,),
        "transformer.to_logits.weight": (vocabulary, width),
    }.items():
        assert have[name] == shape


# ------------------------------------------------------------------------------------------------------------- class


def test_class_embedder_looks_up_its_key_and_its_last_class_means_none():
    model = ClassEmbedder(embed_dim=4, n_classes=11, key="class_label")
    labels = torch.tensor([3, 10])
    out = model.encode({"class_label": labels, "image": None})
    assert out.shape == (2, 1, 4) and torch.equal(out[:, 0], model.embedding.weight[labels])
    assert torch.equal(model({"y": labels}, key="y"), out)
    nothing = model.unconditional_input(3)
    assert nothing["class_label"].tolist() == [10, 10, 10] and nothing["class_label"].dtype == torch.int64
    assert torch.equal(model.encode(nothing), model.embedding.weight[10].expand(3, 1, 4))


def test_class_embedder_names_a_missing_key_and_a_label_out_of_range():
    model = ClassEmbedder(4, n_classes=10)
    with pytest.raises(ValueError, match="no 'class'; it has class_label"):
        model({"class_label": torch.tensor([1])})
    with pytest.raises(ValueError, match="labels from 0 to 10, but n_classes is 10"):
        model({"class": torch.tensor([0, 10])})


# -------------------------------------------------------------------------------------------------------------- CLIP


def tiny_clip() -> FrozenCLIPEmbedder:
    return FrozenCLIPEmbedder(text_config=TINY_CLIP)


def test_clip_encodes_texts_and_the_empty_text_is_no_condition():
    model = seed_weights(tiny_clip())
    out = model.encode(["a horse", ""])
    assert out.shape == (2, 77, 16) and out.isfinite().all() and not out.requires_grad
    assert torch.equal(model.encode(model.unconditional_input(2)), out[1:].expand(2, -1, -1))
    assert torch.allclose(FrozenCLIPEmbedder.encode(model, "a horse"), out[:1], atol=1e-6)


def test_clip_stays_frozen_whatever_its_parent_does():
    parent = nn.Sequential(tiny_clip())
    parent.train()
    assert not any(module.training for module in parent[0].modules()) and not any(
        p.requires_grad for p in parent.parameters()
    )


@pytest.mark.parametrize("positions", ["absent", "rounded"])
@pytest.mark.parametrize("names", ["published", "flat"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_clip_loads_from_a_checkpoint_of_any_transformers_version(tmp_path, positions, names, device):
    parent = nn.ModuleDict({"cond_stage_model": seed_weights(tiny_clip())})
    weights = parent.state_dict()
    key = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert torch.equal(weights[key], torch.arange(77)[None]), "published files hold it"
    weights = {name: value for name, value in weights.items() if name != key}
    if positions == "rounded":
        weights[key] = (torch.arange(77)[None] * 1.003).half()
    if names == "flat":
        weights = {name.replace("text_model.", ""): value for name, value in weights.items()}
    write_weights(weights, tmp_path / "a.safetensors")
    with torch.device(device):
        other = nn.ModuleDict({"cond_stage_model": tiny_clip()})
    report = load_weights(other, tmp_path / "a.safetensors")
    assert report.missing == () and report.unexpected == () and other.cond_stage_model.has_weights
    assert torch.equal(other.cond_stage_model.encode(["a horse"]), parent.cond_stage_model.encode(["a horse"]))
    other.load_state_dict(parent.state_dict(), strict=True)


def test_clip_takes_its_weights_from_a_local_folder_where_no_checkpoint_had_them(tmp_path, no_hub):
    source = seed_weights(tiny_clip())
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"text_config": {**VIT_L_14, **TINY_CLIP}, "model_type": "clip"}))
    weights = {name.removeprefix("transformer."): value for name, value in source.state_dict().items()}
    write_weights(
        weights | {"vision_model.x": torch.ones(1), "logit_scale": torch.ones(1)}, folder / "model.safetensors"
    )
    model = FrozenCLIPEmbedder(version=str(folder))
    assert not model.has_weights
    ensure_weights(nn.Sequential(model))
    assert model.has_weights and torch.equal(model.encode(["a horse"]), source.encode(["a horse"]))


def test_weights_that_are_nowhere_to_be_had_are_one_clear_line(tmp_path, no_hub):
    with pytest.raises(CheckpointError, match=r"not in the hub's cache and not to be downloaded.*local folder"):
        tiny_clip().ensure_weights()
    write_weights({"text_model.x": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**VIT_L_14, **TINY_CLIP}))
    with pytest.raises(CheckpointError, match=r"36 of 36 weights of the text model are missing"):
        FrozenCLIPEmbedder(version=str(tmp_path)).ensure_weights()


def test_a_tiny_text_model_has_no_pretrained_weights_to_find(tmp_path, no_hub):
    parent = nn.ModuleDict({"cond_stage_model": tiny_clip(), "model": nn.Linear(2, 2)})
    ensure_weights(parent)
    write_weights(nn.ModuleDict({"model": nn.Linear(2, 2)}).state_dict(), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="lacks all weights of cond_stage_model"):
        load_weights(parent, tmp_path / "a.ckpt")


def test_a_checkpoint_that_holds_the_weights_asks_no_hub(tmp_path, no_hub):
    model = tiny_clip()
    write_weights(seed_weights(tiny_clip()).state_dict(), tmp_path / "a.ckpt")
    load_weights(model, tmp_path / "a.ckpt")
    model.ensure_weights()


def test_clip_refuses_unknown_versions_and_lengths_while_building():
    with pytest.raises(ValueError, match=r"'openai/unheard-of': neither a folder"):
        FrozenCLIPEmbedder(version="openai/unheard-of")
    with pytest.raises(ValueError, match="max_length 100: from 2 to 77"):
        FrozenCLIPEmbedder(max_length=100, text_config=TINY_CLIP)
    with pytest.raises(ValueError, match="text_config: hidden: not one of vocab_size"):
        FrozenCLIPEmbedder(text_config={"hidden": 3})


# ---------------------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize("vocab_rows", [None, 64])
def test_caption_embedder_learns_and_its_checkpoint_gives_the_same_encoding(tmp_path, vocab_rows):
    torch.manual_seed(0)
    options = {"n_embed": 16, "n_layer": 1, "max_seq_len": 8, "vocab_rows": vocab_rows, "heads": 2, "dim_head": 8}
    model = CaptionEmbedder(**options)
    texts = ["a handwritten seven", "a handwritten two", ""]
    out = model.encode(texts)
    assert out.shape == (3, 8, 16) and not torch.allclose(out[0], out[1], atol=1e-3)
    assert torch.equal(model.encode(model.unconditional_input(1)), out[2:])
    out.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters()), (
        "DDP waits for all"
    )
    write_weights(model.state_dict(), tmp_path / "a.ckpt")
    other = CaptionEmbedder(**options)
    load_weights(other, tmp_path / "a.ckpt")
    assert torch.equal(other.encode(texts), out)


def test_hashed_tokens_are_told_apart_and_their_rows_never_move():
    rows = HashedEmbedding(4096, 4).rows_of(torch.arange(49408))
    pairs = rows.sort(-1).values
    _, counts = (pairs[:, 0] * 4096 + pairs[:, 1]).unique(return_counts=True)
    assert int(counts[counts > 1].sum()) < 0.005 * 49408, "hardly a token shares both rows with another"
    assert HashedEmbedding(4096, 4).rows_of(torch.tensor([0, 320, 49407])).tolist() == [
        [357, 1355],
        [1317, 1823],
        [569, 0],
    ]


# -------------------------------------------------------------------------------------------------------------- BERT

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "horse", "rid", "##ing", "virus", ","]


def tiny_bert(**options) -> BERTEmbedder:
    return BERTEmbedder(n_embed=16, n_layer=1, vocab_size=len(VOCABULARY), max_seq_len=8, **options)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_bert_reads_its_vocabulary_from_a_path_at_the_first_text(tmp_path, form, caplog):
    path = tmp_path / "vocab.txt"
    model = tiny_bert(tokenizer_path=path if form == "file" else tmp_path)
    path.write_text("\n".join(VOCABULARY))
    assert model.tokenizer(["A  Horse, riding", ""]).tolist() == [[2, 5, 6, 10, 7, 8, 3, 0], [2, 3, 0, 0, 0, 0, 0, 0]]
    assert model.encode(["a horse", ""]).shape == (2, 8, 16)
    assert model.unconditional_input(2) == ["", ""]
    with caplog.at_level(logging.WARNING, "ldm"):
        for _ in range(3):
            model.encode(["a horse riding a horse a virus"])
        model.encode(["a horse riding a horse a " + "horse " * 100])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2, "each caption is told once, not in every epoch"
    assert "dropped: 'a virus'" in messages[0] and "more characters" in messages[1]


def test_bert_without_its_vocabulary_says_what_to_do(tmp_path, no_hub):
    with pytest.raises(FileNotFoundError, match="tokenizer_path"):
        tiny_bert().encode(["a horse"])
    with pytest.raises(FileNotFoundError, match="no such file"):
        tiny_bert(tokenizer_path=tmp_path / "no.txt").encode(["a horse"])


def test_bert_without_tokenizer_takes_ids():
    model = tiny_bert(use_tokenizer=False)
    nothing = model.unconditional_input(2)
    assert nothing.shape == (2, 8) and set(nothing.flatten().tolist()) == {len(VOCABULARY) - 1}
    assert model.encode(nothing).shape == (2, 8, 16)
    assert not model.transformer.to_logits.weight.requires_grad, "it can get no gradient"


# ----------------------------------------------------------------------------------------------------------- spatial


def test_spatial_rescaler_without_channels_only_scales():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(SpatialRescaler(n_stages=1, method="nearest", in_channels=1)(x), x[:, :, ::2, ::2])
    assert SpatialRescaler(n_stages=0)(x) is x


def test_spatial_rescaler_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="method 'cubic': one of nearest"):
        SpatialRescaler(method="cubic")
    with pytest.raises(ValueError, match="n_stages -1"):
        SpatialRescaler(n_stages=-1)
    with pytest.raises(ValueError, match="no input that means 'no condition'"):
        SpatialRescaler().unconditional_input(2)
