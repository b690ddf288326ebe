"""Textual inversion in sampling: prompts and negative prompts, names, metadata, repeated images."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.checkpoint.diffusers.embeddings import write_embedding
from ldm.cli import run_command
from ldm.inference import TextToImageRequest, load_model, text_to_image
from ldm.inference.embeddings import read_tokens, warn_unused
from ldm.inference.prompt_weights import PromptEncoder
from ldm.inference.settings import embedding_text, parse_embedding
from ldm.output.images import read_metadata
from scripts import sample_diffusion, txt2img
from tests.scripts.refusals import refused
from tests.tiny import model_flags, save_model

VECTORS = torch.linspace(-3, 3, 32).reshape(2, 16)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("embedding") / "cat.safetensors"
    write_embedding(path, "<my-cat>", VECTORS)
    return path


def load(saved, *embeddings):
    return load_model(saved.config, saved.ckpt, "cpu", "full", embeddings=embeddings)


def encode(pipeline, prompt):
    with pipeline.sampling():
        return pipeline.encode_prompts([prompt])[0]


def test_a_prompt_calls_the_token_by_its_name_or_that_of_the_file(saved, file):
    pipeline = load(saved, (file, None))
    first = encode(pipeline, "a <my-cat>")
    assert not torch.equal(first, encode(load(saved), "a <my-cat>"))
    for name in ("<MY-CAT>", "<cat>"):
        assert torch.equal(encode(pipeline, f"a {name}"), first), name
    assert torch.equal(encode(pipeline, "a cat"), encode(load(saved), "a cat"))
    named = load(saved, (file, "<x>"))
    assert torch.equal(encode(named, "a <x>"), first) and not torch.equal(encode(named, "a cat"), first)


def test_a_name_without_brackets_may_be_an_ordinary_word(saved, tmp_path):
    for name, content in {
        "cat.safetensors": {"emb_params": VECTORS},
        "dog.pt": {"string_to_param": {"*": VECTORS}, "name": "x"},
    }.items():
        save_file(content, tmp_path / name) if name.endswith("s") else torch.save(content, tmp_path / name)
    (cat, dog) = read_tokens([(tmp_path / name, None) for name in ("cat.safetensors", "dog.pt")])
    assert (cat.names, dog.names) == (["cat", "<cat>"], ["x", "dog", "<dog>"])
    pipeline = load(saved, (tmp_path / "cat.safetensors", None))
    assert torch.equal(encode(pipeline, "a cat"), encode(pipeline, "a <cat>"))


def test_prompts_without_the_token_keep_every_bit(saved, file):
    assert torch.equal(encode(load(saved, (file, None)), "a dog"), encode(load(saved), "a dog"))


def test_a_token_that_no_prompt_contains_is_a_warning(saved, file, caplog):
    encoder = load(saved, (file, None)).model.cond_stage_model
    long = "word " * 100 + "<My-Cat>"
    for texts in (["a dog", "a <my-cat>"], ["a dog", "(<cat>:1.2)"], [long]):
        warn_unused(encoder, texts)
    assert not caplog.records
    warn_unused(encoder, ["a <my-cats>", ""])
    assert [record.getMessage() for record in caplog.records] == [
        "no prompt contains <my-cat> or <cat>, the token of an embedding"
    ]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_negative_prompt_may_use_it(saved, file, scale):
    images = []
    for embeddings in ((), ((file, None),)):
        negative = "a <my-cat>" if scale != 1.0 else ""
        request = TextToImageRequest(
            prompt="a dog", negative_prompt=negative, scale=scale, steps=2, n_samples=1, n_iter=1
        )
        (image,) = text_to_image(load(saved, *embeddings), request, progress=False)
        images.append(np.asarray(image.image))
    assert np.array_equal(*images) == (scale == 1.0)


def test_weights_and_chunks_treat_the_vectors_as_one_word(saved, file):
    encoder = load(saved, (file, None)).model.cond_stage_model
    weighted = PromptEncoder(encoder, emphasis=True).tokens("a (<my-cat>:1.3)")
    assert [token.weight for token in weighted] == [1.0, 1.3, 1.3] and weighted[1].id + 1 == weighted[2].id
    chunked = PromptEncoder(encoder, long_prompts=True)
    words = chunked.room - 1
    prompt = "a " * words + "<my-cat> <my-cat>"
    assert chunked.chunks_for([prompt]) == 2
    first, second = chunked._split(prompt, 2)
    assert (len(first), len(second)) == (words, 4)
    assert chunked.chunks_for(["a " * chunked.room]) == 1


def test_a_flag_names_a_file_and_a_token(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:b.pt").touch()
    for text, expected in {"a:b.pt": None, "a:b.pt:<x>": "<x>", "a:b.pt:": None}.items():
        path, token = parse_embedding(text)
        assert (path.name, token) == ("a:b.pt", expected) and parse_embedding(embedding_text(path, token)) == (
            path,
            token,
        )
    with pytest.raises(FileNotFoundError, match=r"--embedding none.pt:x: no such file; pass FILE or FILE:token"):
        parse_embedding("none.pt:x")


def test_a_run_directory_names_the_file_of_its_token(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("last.ckpt", "lora.safetensors", "digit.safetensors"):
        (folder / name).touch()
    assert parse_embedding(str(tmp_path / "run")) == (folder / "digit.safetensors", None)
    assert parse_embedding(f"{tmp_path / 'run'}:<x>") == (folder / "digit.safetensors", "<x>")
    (folder / "other.safetensors").touch()
    with pytest.raises(ValueError, match=r"run: trained 2 tokens; pass .*digit\.safetensors or .*other\.safetensors"):
        parse_embedding(str(tmp_path / "run"))


@pytest.mark.parametrize("script", ["txt2img", "img2img", "inpaint", "upscale", "edit", "sample_conditional"])
def test_every_script_that_samples_from_text_takes_embeddings(script):
    assert "--embedding" in importlib.import_module(f"scripts.{script}").parser().flags


def arguments(saved, outdir, *more):
    flags = ["--prompt", "a <my-cat>", "--ddim_steps", "2", "--n_samples", "1", "--n_iter", "1", "--skip_grid"]
    return [*model_flags(saved, outdir), *flags, *more]


def test_an_image_is_repeated_with_its_embedding_and_a_changed_file_is_refused(saved, file, tmp_path, capsys):
    copy = tmp_path / "cat.safetensors"
    copy.write_bytes(file.read_bytes())
    assert run_command(txt2img.main, arguments(saved, tmp_path / "a", "--embedding", f"{copy}:<my-cat>")) == 0
    image = tmp_path / "a" / "samples" / "00000.png"
    info = read_metadata(image)
    assert info["embedding"] == [f"{copy}:<my-cat>"] and len(info["embedding_fingerprint"][0]) == 16
    again = ["--from-metadata", str(image), "--outdir", str(tmp_path / "b")]
    assert run_command(txt2img.main, again) == 0
    repeated = tmp_path / "b" / "samples" / "00000.png"
    assert read_metadata(repeated) == info
    assert np.array_equal(np.asarray(Image.open(repeated)), np.asarray(Image.open(image)))
    write_embedding(copy, "<my-cat>", -VECTORS)
    capsys.readouterr()
    assert f"--embedding {copy}: not the file that" in refused(txt2img.main, again, capsys)


def test_what_does_not_fit_is_refused_in_one_line(saved, file, tmp_path, capsys):
    write_embedding(tmp_path / "wide.pt", "<x>", torch.zeros(1, 768), "a1111")
    torch.save({"<a>": VECTORS, "<b>": VECTORS}, tmp_path / "two.bin")
    for given, reason in {
        "none.pt": "--embedding none.pt: no such file",
        str(tmp_path / "wide.pt"): "its vectors have width 768, those of the text encoder 16;",
        f"{tmp_path / 'two.bin'}:<x>": "the file has 2 tokens, <a>, <b>; remove :<x>",
        str(saved.ckpt): "the weights of a model",
    }.items():
        assert reason in refused(txt2img.main, arguments(saved, tmp_path / "out", "--embedding", given), capsys)
    twice = ["--embedding", str(file), "--embedding", str(file)]
    assert "two tokens have this name" in refused(txt2img.main, arguments(saved, tmp_path / "out", *twice), capsys)
    unconditional = save_model(tmp_path, "unconditional")
    flags = ["-r", str(unconditional.ckpt), "--config", str(unconditional.config)]
    (tmp_path / "config.yaml").write_bytes(unconditional.config.read_bytes())
    flags = ["-r", str(unconditional.ckpt), "-n", "1", "-l", str(tmp_path / "out"), "--embedding", str(file)]
    assert "this model is not text-conditional" in refused(sample_diffusion.main, flags, capsys)
