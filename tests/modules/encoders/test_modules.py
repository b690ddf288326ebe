"""Laws of the condition encoders: published names and reference values, clear errors."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from ldm.checkpoint import load_weights, write_weights
from ldm.modules.encoders.modules import (
    BERTEmbedder,
    CaptionEmbedder,
    ClassEmbedder,
    HashedEmbedding,
    SpatialRescaler,
    TransformerEmbedder,
)
from tests.reference import GOLDEN, TOLERANCE, make, rel_error, seed_weights


def test_importing_the_encoders_loads_no_pretrained_ones():
    heavy = {"open_clip", "transformers.models.clip.modeling_clip"}
    code = f"import sys, ldm.modules.encoders.modules; assert not {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_transformer_embedder_gives_the_reference_values():
    tokens = make({"kind": "int", "shape": [2, 12], "seed": 21, "low": 0, "high": 100})
    model = seed_weights(TransformerEmbedder(n_embed=64, n_layer=2, vocab_size=100, max_seq_len=12, device="cpu"))
    with torch.no_grad():
        assert rel_error(model(tokens), np.load(GOLDEN / "modules/transformer_embedder.npz")["out0"]) < TOLERANCE


def test_spatial_rescaler_gives_the_reference_values():
    x = make({"shape": [2, 5, 16, 16], "seed": 22})
    model = seed_weights(SpatialRescaler(n_stages=2, in_channels=5, out_channels=3))
    with torch.no_grad():
        assert rel_error(model.encode(x), np.load(GOLDEN / "modules/spatial_rescaler.npz")["out0"]) < TOLERANCE


@pytest.mark.parametrize(  # txt2img-1p4B-eval.yaml, models/ldm/{text2img256,layout2img-openimages256}/config.yaml
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


def test_class_embedder_looks_up_its_key_and_its_last_class_is_unconditional():
    model = ClassEmbedder(embed_dim=4, n_classes=11, key="class_label")
    labels = torch.tensor([3, 10])
    out = model.encode({"class_label": labels, "image": None})
    assert out.shape == (2, 1, 4) and torch.equal(out[:, 0], model.embedding.weight[labels])
    assert torch.equal(model({"y": labels}, key="y"), out)
    null = model.unconditional_input(3)
    assert null["class_label"].tolist() == [10, 10, 10] and null["class_label"].dtype == torch.int64
    assert torch.equal(model.encode(null), model.embedding.weight[10].expand(3, 1, 4))


def test_class_embedder_names_a_missing_key_and_an_invalid_label():
    model = ClassEmbedder(4, n_classes=10)
    with pytest.raises(ValueError, match="no key 'class'; it has class_label"):
        model({"class_label": torch.tensor([1])})
    with pytest.raises(ValueError, match="labels from 0 to 10, but n_classes is 10"):
        model({"class": torch.tensor([0, 10])})


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
        "DDP waits for every gradient"
    )
    write_weights(model.state_dict(), tmp_path / "a.ckpt")
    other = CaptionEmbedder(**options)
    load_weights(other, tmp_path / "a.ckpt")
    assert torch.equal(other.encode(texts), out)


def test_hashed_tokens_differ_and_their_rows_never_change():
    rows = HashedEmbedding(4096, 4).rows_of(torch.arange(49408))
    pairs = rows.sort(-1).values
    _, counts = (pairs[:, 0] * 4096 + pairs[:, 1]).unique(return_counts=True)
    assert int(counts[counts > 1].sum()) < 0.005 * 49408, "hardly any token shares both rows with another"
    assert HashedEmbedding(4096, 4).rows_of(torch.tensor([0, 320, 49407])).tolist() == [
        [357, 1355],
        [1317, 1823],
        [569, 0],
    ]


def test_spatial_rescaler_without_channels_only_scales():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(SpatialRescaler(n_stages=1, method="nearest", in_channels=1)(x), x[:, :, ::2, ::2])
    assert SpatialRescaler(n_stages=0)(x) is x


def test_spatial_rescaler_raises_for_invalid_parameters():
    with pytest.raises(ValueError, match="method 'cubic': choose one of nearest"):
        SpatialRescaler(method="cubic")
    with pytest.raises(ValueError, match="no unconditional input"):
        SpatialRescaler().unconditional_input(2)
