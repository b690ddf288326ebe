"""Files of a diffusers folder: which one holds a component's weights, and JSON configs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint.diffusers.rules import ConversionError
from ldm.checkpoint.formats import read_shards, read_tensors
from ldm.config.files import load_json

_INDEX = ".index.json"
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDINGS = (".safetensors", f".safetensors{_INDEX}", ".bin", f".bin{_INDEX}")
_RENAMED = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ConversionError if the file cannot be read or holds something else."""
    try:
        return load_json(path)
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConversionError(str(error)) from error


def as_json(content: Mapping[str, Any] | list[Any]) -> str:
    sort = isinstance(content, Mapping) and "_class_name" in content
    return json.dumps(content, indent=2, sort_keys=sort, ensure_ascii=False) + "\n"


def is_model_folder(folder: Path) -> bool:
    """True for the folder of a pipeline, or of one UNet or first stage."""
    if (folder / "unet" / "config.json").is_file():
        return True
    try:
        return "_class_name" in read_json(folder / "config.json")
    except ConversionError:
        return False


def weights_file(folder: Path) -> Path:
    """A component's weights or index of shards: .safetensors before .bin, full precision before a variant."""
    for ending in _ENDINGS:
        for stem in _STEMS:
            if (folder / f"{stem}{ending}").is_file():
                return folder / f"{stem}{ending}"
    for stem in _STEMS:  # diffusion_pytorch_model.fp16.safetensors
        variants = sorted(path for ending in (".safetensors", ".bin") for path in folder.glob(f"{stem}.*{ending}"))
        if variants:
            return variants[0]
    raise ConversionError(f"{folder}: no weights found ({_STEMS[0]}.safetensors, .bin or an index of shards)")


def read_component(folder: Path) -> dict[str, Tensor]:
    """A component's tensors under diffusers' current names, memory-mapped."""
    path = weights_file(folder)
    tensors = read_shards(path) if path.name.endswith(_INDEX) else read_tensors(path)
    return {rename_legacy_key(name): tensor for name, tensor in tensors.items()}


def rename_legacy_key(name: str) -> str:
    """The current name of a tensor that older diffusers or newer transformers versions name differently."""
    head, _, leaf = name.rpartition(".")
    for old, new in _RENAMED:
        if head.endswith(f".{old}") and ".attentions." in head:
            return f"{head.removesuffix(old)}{new}.{leaf}"
    if name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")):
        return f"text_model.{name}"
    return name
