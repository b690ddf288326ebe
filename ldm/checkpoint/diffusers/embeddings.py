"""Files of textual inversion embeddings (arXiv 2208.01618), for the text encoders of Stable Diffusion v1 and v2.

| layout | file | content |
|---|---|---|
| diffusers | .safetensors, .bin | {token: (D,) or (N, D)}, several tokens possible |
| AUTOMATIC1111 | .pt, .bin | {"string_to_param": {"*": (N, D)}, "name": token, ...}; the paper's has no name |
| AUTOMATIC1111 | .safetensors | {"emb_params": (N, D)} |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.checkpoint.diffusers.rules import ConversionError
from ldm.checkpoint.diffusers.write import check_target
from ldm.checkpoint.formats import CheckpointError, preview, read_metadata, read_state
from ldm.checkpoint.write import write_checkpoint, write_weights

A1111_TENSOR, PLACEHOLDER = "emb_params", "*"
TOKEN = "token"  # key of the metadata in a .safetensors file
LAYOUTS = ("diffusers", "a1111")
SUFFIXES = (".safetensors", ".pt", ".bin")
MAX_VECTORS = 1000  # far above the length of every text encoder
_SDXL = ("clip_l", "clip_g")


class Embedding(NamedTuple):
    """The vectors (N, D) of a token; `token` is its name in the file, None if the file has none."""

    token: str | None
    vectors: Tensor


def read_embeddings(path: str | os.PathLike) -> list[Embedding]:
    """Read the embeddings of a file in any layout, float32 on the CPU. Raises CheckpointError for other files."""
    path = Path(path)
    content = read_state(path)
    if not content:
        raise CheckpointError(f"{path}: not an embedding file: it holds nothing")
    if "string_to_param" in content:
        return _read_a1111(path, content)
    if A1111_TENSOR in content:
        token = read_metadata(path).get(TOKEN)  # of a file that `write_embedding` wrote
        return [Embedding(token, _vectors(path, A1111_TENSOR, content[A1111_TENSOR]))]
    if set(_SDXL) & set(content):
        raise CheckpointError(
            f"{path}: an embedding for Stable Diffusion XL ({', '.join(map(str, content))}), which has two text "
            "encoders; use one for version 1 or 2"
        )
    _refuse_others(path, content)
    return [Embedding(str(token), _vectors(path, token, tensor)) for token, tensor in content.items()]


def write_embedding(path: str | os.PathLike, token: str, vectors: Tensor, layout: str = "diffusers") -> None:
    """Write a token's vectors (N, D) as .safetensors or, for another suffix, with torch.save; never partly.

    Raises ValueError for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    path, vectors = Path(path), vectors.detach().float().cpu()
    name = token if layout == "diffusers" else A1111_TENSOR
    if path.suffix == ".safetensors":
        write_weights({name: vectors}, path, {TOKEN: token})
    elif layout == "diffusers":
        write_checkpoint({token: vectors}, path)
    else:
        ids = {PLACEHOLDER: 265}  # CLIP's id of "*"
        write_checkpoint({"string_to_token": ids, "string_to_param": {PLACEHOLDER: vectors}, "name": token}, path)


def convert_embedding(source: Path, target: Path, layout: str) -> Embedding:
    """Write the embedding of a file in a layout and return it; without a name it gets the file's, without its suffix.

    Raises CheckpointError for other files; ConversionError for several tokens, a `target` that exists or its suffix.
    """
    check_target(target, SUFFIXES)
    first, *others = read_embeddings(source)
    if others:
        tokens = preview([str(each.token) for each in (first, *others)])
        raise ConversionError(f"{source}: holds {len(others) + 1} tokens ({tokens}); files of one token are converted")
    embedding = first._replace(token=first.token or source.stem)
    write_embedding(target, str(embedding.token), embedding.vectors, layout)
    return embedding


def _read_a1111(path: Path, content: Mapping[Any, Any]) -> list[Embedding]:
    tensors, name = content["string_to_param"], content.get("name")
    if not isinstance(tensors, Mapping) or not tensors:
        raise CheckpointError(f"{path}: string_to_param holds {_kind(tensors)}; expected {{token: vectors}}")
    name = name if isinstance(name, str) and name.strip() else None
    names = {token: name if token == PLACEHOLDER or (len(tensors) == 1 and name) else str(token) for token in tensors}
    return [Embedding(names[token], _vectors(path, token, tensor)) for token, tensor in tensors.items()]


def _vectors(path: Path, token: object, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{path}: not an embedding file: {str(token)[:60]!r} is {_kind(tensor)}, not a tensor")
    shape = tuple(tensor.shape)
    if tensor.ndim not in (1, 2) or not tensor.is_floating_point() or not tensor.numel():
        raise CheckpointError(
            f"{path}: {str(token)[:60]!r} is {tensor.dtype} of shape {shape}; expected vectors (N, D) of a token"
        )
    vectors = tensor.detach().reshape(-1, shape[-1])
    if len(vectors) > MAX_VECTORS:
        raise CheckpointError(f"{path}: {str(token)[:60]!r} has {len(vectors)} vectors; a token has a few")
    vectors = vectors.float().clone()
    if not torch.isfinite(vectors).all():
        raise CheckpointError(f"{path}: the vectors of {str(token)[:60]!r} are not finite")
    return vectors


def _refuse_others(path: Path, content: Mapping[Any, Any]) -> None:
    """Raise CheckpointError for the weights of a model or a LoRA."""
    keys = [str(key) for key in content]
    if any("lora_" in key or ".lora" in key for key in keys):
        raise CheckpointError(f"{path}: a LoRA ({preview(keys, 1)}), not an embedding: use --lora")
    if any("token_embeddings." in key for key in keys):
        raise CheckpointError(f"{path}: the checkpoint of a run: pass the embedding file in its folder")
    if any(isinstance(value, Tensor) and value.ndim > 2 for value in content.values()):
        raise CheckpointError(f"{path}: the weights of a model ({preview(keys)}), not an embedding")


def _kind(value: object) -> str:
    return f"a {type(value).__name__}" if value or not isinstance(value, Mapping) else "nothing"
