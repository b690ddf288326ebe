"""Stable Diffusion v1's text encoder: published names, numbers, loading, no network while building."""

import gzip
import json

import pytest
import torch
from torch import nn

from ldm.checkpoint import CheckpointError, ensure_weights, load_weights, weights_on_meta, write_weights
from ldm.config.text_shapes import VIT_L_14
from ldm.modules.encoders.clip import FrozenCLIPEmbedder
from ldm.modules.encoders.open_clip import hidden_states, text_tower
from tests.reference import GOLDEN, rel_error, seed_weights, transformers_model

TINY = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
POSITION_IDS = "transformer.text_model.embeddings.position_ids"
TEXTS = ["a horse", "", "one two three " * 40]


def tiny() -> FrozenCLIPEmbedder:
    return FrozenCLIPEmbedder(text_config=TINY)


@pytest.fixture(scope="module")
def seeded() -> FrozenCLIPEmbedder:
    return seed_weights(tiny())


def test_names_and_shapes_are_those_of_stable_diffusion_v1():
    with gzip.open(GOLDEN / "manifests/stable-diffusion-v1.json.gz") as file:
        manifest = json.load(file)["configs/stable-diffusion/v1-inference.yaml"]
    wanted = {name.removeprefix("cond_stage_model."): shape for name, shape in manifest.items() if "cond_stage" in name}
    with torch.device("meta"):
        model = FrozenCLIPEmbedder()
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == wanted
    assert set(wanted) == {POSITION_IDS, *(name for name, _ in model.named_parameters())}


def test_the_numbers_are_those_of_open_clips_tower_with_the_same_weights(seeded):
    shape = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2, "embed_dim": 8}
    tower, ours = text_tower(shape, quick_gelu=True).eval(), dict(seeded.transformer.text_model.named_parameters())
    state = {
        "token_embedding.weight": ours["embeddings.token_embedding.weight"],
        "positional_embedding": ours["embeddings.position_embedding.weight"],
    }
    for leaf in ("weight", "bias"):
        state[f"ln_final.{leaf}"] = ours[f"final_layer_norm.{leaf}"]
        for n in range(2):
            block, layer = f"transformer.resblocks.{n}", f"encoder.layers.{n}"
            qkv = [ours[f"{layer}.self_attn.{name}_proj.{leaf}"] for name in "qkv"]
            state[f"{block}.attn.in_proj_{leaf}"] = torch.cat(qkv)
            for theirs, name in (
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("attn.out_proj", "self_attn.out_proj"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                state[f"{block}.{theirs}.{leaf}"] = ours[f"{layer}.{name}.{leaf}"]
    assert tower.load_state_dict(state, strict=False).unexpected_keys == []
    tokens = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert rel_error(seeded.encode_tokens(tokens), hidden_states(tower, tokens)) < 1e-6


def test_texts_are_encoded_and_the_empty_text_is_unconditional(seeded):
    out = seeded.encode(["a horse", ""])
    assert out.shape == (2, 77, 16) and out.isfinite().all() and not out.requires_grad
    assert torch.equal(seeded.encode(seeded.unconditional_input(2)), out[1:].expand(2, -1, -1))
    assert torch.allclose(seeded.encode("a horse"), out[:1], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_the_same_encoding_within_their_rounding(seeded, dtype):
    half = tiny().to(dtype)
    half.load_state_dict(seeded.state_dict())
    out = half.encode(TEXTS)
    assert out.dtype == dtype and rel_error(out.float(), seeded.encode(TEXTS)) < 3e-2


def test_the_numbers_are_those_of_transformers_model(seeded):
    theirs, ids = transformers_model(seeded), seeded.tokenize(TEXTS)
    for mask in (None, (torch.arange(77) < 9).long().expand(3, -1)):
        with torch.no_grad():
            ours, expected = (model(ids, mask, output_hidden_states=True) for model in (seeded.transformer, theirs))
        assert rel_error(ours.pooler_output, expected.pooler_output) < 1e-6
        for one, other in zip(ours.hidden_states, expected.hidden_states, strict=True):
            assert rel_error(one, other) < 1e-6


def test_its_initial_weights_have_the_spread_of_transformers():
    torch.manual_seed(0)
    fresh = tiny()
    theirs = dict(transformers_model(fresh, copied=False).named_parameters())
    for name, value in fresh.transformer.text_model.named_parameters():
        other = next(theirs[key] for key in (name, f"text_model.{name}") if key in theirs).detach()
        assert torch.equal(value, other) if value.ndim == 1 else abs(value.std() / other.std() - 1) < 0.2, name


def test_it_has_the_calls_of_transformers_model_and_tokenizer_for_research_code(seeded):
    """Clip skip and textual inversion call these."""
    options = {"truncation": True, "max_length": 77, "padding": "max_length", "return_tensors": "pt"}
    ids = seeded.tokenizer(["a horse"], **options)["input_ids"]
    out = seeded.transformer(input_ids=ids, output_hidden_states=True)
    assert torch.equal(out.last_hidden_state, seeded.encode(["a horse"])) and len(out.hidden_states) == 3
    text_model = seeded.transformer.text_model
    assert torch.allclose(text_model.final_layer_norm(out.hidden_states[-1]), out.last_hidden_state, atol=1e-6)
    assert seeded.transformer.get_input_embeddings() is text_model.embeddings.token_embedding
    seeded.device = "cpu"


def test_it_stays_frozen_whatever_its_parent_does():
    parent = nn.Sequential(tiny()).train()
    assert not any(module.training for module in parent[0].modules())
    assert not any(parameter.requires_grad for parameter in parent.parameters())


@pytest.mark.parametrize("positions", ["absent", "rounded"])
@pytest.mark.parametrize("names", ["published", "flat"])
@pytest.mark.parametrize("build", ["cpu", "meta", "weights_on_meta"])
def test_it_loads_from_a_checkpoint_of_any_transformers_version(tmp_path, seeded, positions, names, build):
    parent = nn.ModuleDict({"cond_stage_model": seeded})
    weights, key = parent.state_dict(), f"cond_stage_model.{POSITION_IDS}"
    assert torch.equal(weights.pop(key), torch.arange(77)[None]), "published files hold it"
    if positions == "rounded":
        weights[key] = (torch.arange(77)[None] * 1.003).half()
    if names == "flat":
        weights = {name.replace("text_model.", ""): value for name, value in weights.items()}
    write_weights(weights, tmp_path / "a.safetensors")
    with weights_on_meta() if build == "weights_on_meta" else torch.device(build):
        other = nn.ModuleDict({"cond_stage_model": tiny()})
    report = load_weights(other, tmp_path / "a.safetensors")
    assert report.missing == () and report.unexpected == () and other.cond_stage_model.has_weights
    assert torch.equal(other.cond_stage_model.encode(TEXTS), seeded.encode(TEXTS))
    other.load_state_dict(parent.state_dict(), strict=True)


def test_weights_come_from_a_local_folder_if_no_checkpoint_had_them(tmp_path, seeded, no_hub):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {**VIT_L_14, **TINY}, "model_type": "clip"}))
    weights = {name.removeprefix("transformer."): value for name, value in seeded.state_dict().items()}
    write_weights({**weights, "vision_model.x": torch.ones(1)}, tmp_path / "model.safetensors")
    model = FrozenCLIPEmbedder(version=str(tmp_path))
    assert not model.has_weights
    ensure_weights(nn.Sequential(model))
    assert model.has_weights and torch.equal(model.encode(TEXTS), seeded.encode(TEXTS))
    write_weights({"text_model.x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"36 of 36 weights of the encoder are missing"):
        FrozenCLIPEmbedder(version=str(tmp_path)).ensure_weights()


def test_missing_weights_are_one_clear_line(no_hub):
    with pytest.raises(
        CheckpointError, match=r"not in the checkpoint or the hub cache, and the download.*local folder"
    ):
        tiny().ensure_weights()


def test_a_tiny_text_model_has_no_pretrained_weights_to_find(tmp_path, no_hub):
    parent = nn.ModuleDict({"cond_stage_model": tiny(), "model": nn.Linear(2, 2)})
    ensure_weights(parent)
    write_weights(nn.ModuleDict({"model": nn.Linear(2, 2)}).state_dict(), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="lacks all weights of cond_stage_model"):
        load_weights(parent, tmp_path / "a.ckpt")


def test_a_checkpoint_that_holds_the_weights_is_enough(tmp_path, seeded, no_hub):
    model = tiny()
    write_weights(seeded.state_dict(), tmp_path / "a.ckpt")
    load_weights(model, tmp_path / "a.ckpt")
    model.ensure_weights()


@pytest.mark.parametrize(
    "params, words",
    [
        ({"version": "openai/unheard-of"}, r"'openai/unheard-of': neither a folder"),
        ({"max_length": 100, "text_config": TINY}, "max_length 100: choose 2 to 77"),
        ({"text_config": {"hidden": 3}}, "text_config: hidden: not one of vocab_size"),
        ({"text_config": {**TINY, "hidden_act": "cubic"}}, "hidden_act 'cubic': choose one of quick_gelu, gelu"),
    ],
)
def test_invalid_parameters_are_refused_while_building(params, words):
    with pytest.raises(ValueError, match=words):
        FrozenCLIPEmbedder(**params)


def test_clip_skip_as_research_code_writes_it():
    """Replaced `forward`: the published tokenizer and transformer, an earlier layer, the final LayerNorm."""

    def forward(self, text):
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        begin, end, pad = (getattr(self.tokenizer, name) for name in names)
        assert (begin, end, pad) == (49406, 49407, 49407)
        ids = [
            [begin, *tokens[:75], end]
            for tokens in self.tokenizer(text, truncation=False, add_special_tokens=False)["input_ids"]
        ]
        tokens = torch.tensor([row + [pad] * (77 - len(row)) for row in ids]).to(self.device)
        out = self.transformer(input_ids=tokens, output_hidden_states=True)
        return self.transformer.text_model.final_layer_norm(out.hidden_states[-self.clip_skip])

    model = tiny().eval()
    model.device = "cuda"  # published scripts set it; it changes nothing
    texts = ["a red kite", "two boats"]
    for model.clip_skip in (1, 2):
        out = forward(model, texts)
        assert out.shape[:2] == (2, 77)
        assert torch.allclose(out, model(texts), atol=1e-5) is (model.clip_skip == 1)


def test_layer_and_layer_idx_choose_the_published_outputs(seeded):
    tokens = seeded.tokenize(TEXTS)
    found = seeded.transformer(input_ids=tokens, output_hidden_states=True)
    for layer, index, expected in (
        ("last", None, found.last_hidden_state),
        ("pooled", None, found.pooler_output[:, None]),
        ("hidden", -2, found.hidden_states[1]),
        ("hidden", 0, found.hidden_states[0]),
    ):
        model = FrozenCLIPEmbedder(text_config=TINY, layer=layer, layer_idx=index)
        model.load_state_dict(seeded.state_dict())
        assert torch.equal(model(TEXTS), expected)
    for layer, index in (("hidden", None), ("last", 1), ("hidden", 3)):
        with pytest.raises(ValueError, match=f"layer_idx {index}: layer '{layer}'"):
            FrozenCLIPEmbedder(text_config=TINY, layer=layer, layer_idx=index)
