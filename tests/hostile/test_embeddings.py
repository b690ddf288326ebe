"""Hostile and foreign embedding files: nothing runs, and one line says what the file is."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoint import CheckpointError, UnsafeCheckpointError
from ldm.checkpoint.diffusers.embeddings import read_embeddings
from ldm.cli import one_line
from ldm.inference.embeddings import add_tokens, read_tokens
from ldm.modules.encoders.modules import CaptionEmbedder
from tests.hostile.weights import FILES

VECTORS = torch.ones(2, 16)


def legacy(content):
    return lambda path: torch.save(content, path, _use_new_zipfile_serialization=False)


def saved(content):
    return lambda path: torch.save(content, path)


def tensors(**content):
    return lambda path: save_file({name: tensor.clone() for name, tensor in content.items()}, path)


def raw(content):
    return lambda path: path.write_bytes(content)


def header(**entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


class Evil:
    """Opens a file when it is unpickled."""

    def __reduce__(self):
        return open, ("canary", "w")


FOREIGN = {  # name of the file -> (how it is written, what the error says)
    "evil-vector.pt": (saved({"string_to_param": {"*": Evil()}, "name": "x"}), "open, which is code"),
    "evil-name.bin": (legacy({"<x>": VECTORS, "name": Evil()}), "open, which is code"),
    "evil-token.pt": (saved({"string_to_token": {"*": Evil()}, "string_to_param": {"*": VECTORS}}), "which is code"),
    "empty.pt": (raw(b""), "empty"),
    "page.bin": (raw(b"<html>login</html>"), "a web page"),
    "pointer.safetensors": (raw(b"version https://git-lfs.github.com/spec/v1\n"), "a git-lfs pointer"),
    "words.pt": (raw(b"cat sits on the mat"), "neither a .ckpt nor a .safetensors file"),
    "half.safetensors": (raw(header(x={"dtype": "F32", "shape": [2, 16], "data_offsets": [0, 128]})), "complete"),
    "lying.safetensors": (raw(struct.pack("<Q", 10**15) + b"{}"), "neither a .ckpt nor"),
    "list.pt": (saved([VECTORS]), "holds a list"),
    "tensor.bin": (saved(VECTORS), "holds a Tensor"),
    "nothing.bin": (saved({}), "holds nothing"),
    "no-tensor.bin": (saved({"<x>": "cat"}), "'<x>' is a str, not a tensor"),
    "no-param.pt": (saved({"string_to_param": {}}), "string_to_param holds nothing"),
    "param-list.pt": (saved({"string_to_param": [VECTORS], "name": "x"}), "string_to_param holds a list"),
    "integers.safetensors": (tensors(x=torch.ones(2, 16, dtype=torch.int64)), "expected vectors (N, D) of a token"),
    "scalar.bin": (saved({"<x>": torch.tensor(1.0)}), "expected vectors (N, D) of a token"),
    "no-vector.bin": (saved({"<x>": torch.zeros(0, 16)}), "expected vectors (N, D) of a token"),
    "nan.bin": (saved({"<x>": VECTORS * float("nan")}), "the vectors of '<x>' are not finite"),
    "whole-table.safetensors": (tensors(emb_params=torch.zeros(2000, 16)), "2000 vectors; a token has a few"),
    "sdxl.safetensors": (tensors(clip_l=VECTORS, clip_g=VECTORS), "an embedding for Stable Diffusion XL"),
    "lora.safetensors": (tensors(**{"lora_unet_x.lora_down.weight": VECTORS}), "a LoRA"),
    "model.ckpt": (saved({"state_dict": {"model.out.weight": torch.ones(4, 4, 3, 3)}}), "the weights of a model"),
    "wide.bin": (saved({"<x>": torch.ones(1, 768)}), "its vectors have width 768, those of the text encoder 16;"),
    "long.bin": (saved({"<x>": torch.ones(11, 16)}), "11 vectors, but a prompt has room for 10 tokens"),
    "blank.bin": (saved({"  ": torch.ones(1, 16), "<x>": VECTORS}), "the name of a token must not be empty"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, message = FOREIGN[name]
    path = tmp_path / name
    write(path)
    encoder = CaptionEmbedder(16, 1, max_seq_len=12, heads=2, dim_head=8)
    with pytest.raises(ValueError) as error:
        add_tokens(encoder, read_tokens([(path, None)]))
    text = str(error.value)
    assert message in text and str(path) in text and text == one_line(error.value)
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("which", FILES)
def test_a_hostile_file_runs_nothing(which, tmp_path):
    path, canary = tmp_path / f"x{FILES[which].suffix}", tmp_path / "canary"
    FILES[which].write(path, canary)
    with pytest.raises(CheckpointError) as error:
        read_embeddings(path)
    assert not canary.exists() and str(path) in str(error.value)
    if FILES[which].refused is not None:
        assert isinstance(error.value, UnsafeCheckpointError)
