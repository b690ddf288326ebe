"""The files of a diffusers folder: which one holds a component's weights, shards and their index, configs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.diffusers.rules import InterchangeError
from ldm.config.files import load_json

if TYPE_CHECKING:
    from torch import Tensor

INDEX = ".index.json"
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDINGS = (".safetensors", f".safetensors{INDEX}", ".bin", f".bin{INDEX}")
_RENAMED = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; InterchangeError in one line where the file holds none."""
    try:
        return load_json(path)
    except OSError as error:
        raise InterchangeError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InterchangeError(str(error)) from error


def weights_file(folder: Path) -> Path:
    """The file, or the index of shards, with a component's weights: safetensors before .bin, full precision before a variant."""
    for ending in _ENDINGS:
        for stem in _STEMS:
            if (folder / f"{stem}{ending}").is_file():
                return folder / f"{stem}{ending}"
    for stem in _STEMS:  # diffusion_pytorch_model.fp16.safetensors
        variants = sorted(path for ending in (".safetensors", ".bin") for path in folder.glob(f"{stem}.*{ending}"))
        if variants:
            return variants[0]
    raise InterchangeError(f"{folder}: holds no weights ({_STEMS[0]}.safetensors, .bin or an index of shards)")


def read_component(folder: Path) -> dict[str, Tensor]:
    """A component's tensors in today's names, memory-mapped."""
    from ldm.checkpoint.formats import existing_file, read_shards, read_tensors

    path = weights_file(folder)
    tensors = read_shards(path) if path.name.endswith(INDEX) else read_tensors(existing_file(path))
    return {today(name): tensor for name, tensor in tensors.items()}


def today(name: str) -> str:
    """A tensor's present name, where older versions of diffusers and newer ones of transformers have another."""
    head, _, leaf = name.rpartition(".")
    for old, new in _RENAMED:
        if head.endswith(f".{old}") and ".attentions." in head:
            return f"{head.removesuffix(old)}{new}.{leaf}"
    if name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")):
        return f"text_model.{name}"
    return name


def files_of(place: Path) -> list[Path]:
    """Every file that says which model a folder holds: configs and weights, in the order of their names; of a file, itself."""
    if not place.is_dir():
        return [place]
    endings, folder = (".json", ".safetensors", ".bin"), place
    return sorted(path for path in folder.rglob("*") if path.suffix in endings and path.is_file())


def is_diffusers_folder(folder: Path) -> bool:
    """Whether this is a folder of a pipeline, or of one UNet or first stage."""
    if (folder / "unet" / "config.json").is_file():
        return True
    try:
        return "_class_name" in read_json(folder / "config.json")
    except InterchangeError:
        return False


def as_json(content: Mapping[str, Any] | list[Any]) -> str:
    return (
        json.dumps(
            content, indent=2, sort_keys=isinstance(content, Mapping) and "_class_name" in content, ensure_ascii=False
        )
        + "\n"
    )
