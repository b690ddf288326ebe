"""Files of textual inversion: every layout is read, and diffusers reads ours to the same conditioning."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.checkpoint import CheckpointError
from ldm.checkpoint.diffusers.embeddings import read_embeddings, write_embedding
from tests.reference import transformers_model

VECTORS = torch.arange(32.0).reshape(2, 16) / 32


def a1111(**more):
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "cat", "step": 9, **more}


def paper():
    parameters = nn.ParameterDict({"*": nn.Parameter(VECTORS.clone())})
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}


FILES = {  # name of the file -> (content, token)
    "diffusers.bin": ({"<cat>": VECTORS}, "<cat>"),
    "diffusers.safetensors": ({"<cat>": VECTORS}, "<cat>"),
    "half.bin": ({"<cat>": VECTORS.half()}, "<cat>"),
    "a1111.pt": (a1111(), "cat"),
    "a1111-parameter.pt": (a1111(string_to_param={"*": nn.Parameter(VECTORS)}), "cat"),
    "no-name.pt": (a1111(name=None, sd_checkpoint=None), None),
    "named-token.pt": ({"string_to_param": {"<cat>": VECTORS}}, "<cat>"),
    "paper.pt": (paper(), None),
    "a1111.safetensors": ({"emb_params": VECTORS}, None),
}


def save(path, content, **options):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("name", FILES)
def test_every_layout_is_read(tmp_path, name):
    content, token = FILES[name]
    ((found, vectors),) = read_embeddings(save(tmp_path / name, content))
    assert found == token and torch.equal(vectors, VECTORS) and vectors.dtype == torch.float32


def test_legacy_pickles_and_single_vectors_are_read(tmp_path):
    path = save(tmp_path / "old.bin", {"<cat>": VECTORS[0]}, _use_new_zipfile_serialization=False)
    assert torch.equal(read_embeddings(path)[0].vectors, VECTORS[:1])


def test_a_file_of_several_tokens_is_read_whole(tmp_path):
    path = save(tmp_path / "two.bin", {"<a>": VECTORS[0], "<b>": VECTORS})
    assert [(token, len(vectors)) for token, vectors in read_embeddings(path)] == [("<a>", 1), ("<b>", 2)]


@pytest.mark.parametrize("layout", ["diffusers", "a1111"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_what_is_written_reads_back(tmp_path, layout, suffix):
    path = tmp_path / f"x{suffix}"
    write_embedding(path, "<cat>", VECTORS, layout)
    ((token, vectors),) = read_embeddings(path)
    assert token == "<cat>" and torch.equal(vectors, VECTORS)
    if suffix == ".safetensors":
        assert list(load_file(path)) == ["emb_params" if layout == "a1111" else "<cat>"]


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layout 'kohya': choose one of diffusers, a1111"):
        write_embedding(tmp_path / "x.pt", "<cat>", VECTORS, "kohya")


@pytest.mark.parametrize("name", ["diffusers.safetensors", "diffusers.bin", "a1111.pt", "written"])
def test_diffusers_encodes_prompts_with_the_token_alike(tmp_path, name):
    loaders = pytest.importorskip("diffusers.loaders")
    from ldm.inference.embeddings import add_tokens, read_tokens
    from ldm.modules.encoders.modules import FrozenCLIPEmbedder
    from ldm.modules.encoders.tokenizers import CLIPTokenizer

    path = tmp_path / "cat.safetensors"
    if name == "written":
        write_embedding(path, "<cat>", VECTORS)
    else:
        path = save(tmp_path / name, a1111(name="<cat>") if name == "a1111.pt" else FILES[name][0])
    torch.manual_seed(2)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ours = FrozenCLIPEmbedder(text_config=shape).eval()

    class Pipeline(loaders.TextualInversionLoaderMixin):
        def __init__(self):
            self.text_encoder = transformers_model(ours)
            self.tokenizer, self.components, self.hf_device_map = CLIPTokenizer().tokenizer, {}, None

    theirs = Pipeline()
    theirs.load_textual_inversion(str(tmp_path), weight_name=path.name, local_files_only=True)
    prompt = "a photo of <cat>, on a table"
    expanded = theirs.maybe_convert_prompt(prompt, theirs.tokenizer)
    ids = theirs.tokenizer(expanded, padding="max_length", max_length=77, return_tensors="pt").input_ids
    add_tokens(ours, read_tokens([(path, None)]))
    with torch.no_grad():
        expected = theirs.text_encoder(ids).last_hidden_state
        torch.testing.assert_close(ours.encode([prompt]), expected, rtol=1e-5, atol=1e-5)
        assert (ours.encode([prompt]) - ours.encode(["a photo of , on a table"])).abs().max() > 0.01


def test_the_checkpoint_of_a_run_is_refused_with_advice(tmp_path):
    path = save(tmp_path / "last.ckpt", {"state_dict": {"cond_stage_model.token_embeddings.vectors.0": VECTORS}})
    with pytest.raises(CheckpointError, match="the checkpoint of a run: pass the embedding file in its folder"):
        read_embeddings(path)
