"""Shapes of the pretrained text encoders in configs: CLIP's in transformers' terms, OpenCLIP's in open_clip's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.config.files import load_json

CLIP_VERSION = "openai/clip-vit-large-patch14"  # Stable Diffusion v1
OPEN_CLIP_ARCH = "ViT-H-14"  # Stable Diffusion v2

VIT_L_14: dict[str, Any] = {  # openai/clip-vit-large-patch14, config.json, text_config
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLIP_SHAPES: dict[str, dict[str, Any]] = {CLIP_VERSION: VIT_L_14}
# open_clip's model config: text_cfg and embed_dim
VIT_H_14 = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24, "embed_dim": 1024}
OPEN_CLIP_SHAPES: dict[str, dict[str, int]] = {OPEN_CLIP_ARCH: VIT_H_14}


def clip_shape(version: str = CLIP_VERSION, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the shape of the text model of a hub name or local folder (its config.json), with some values replaced.

    Raises ValueError for an unknown hub name, since building a model never downloads, and for an unknown override.
    """
    if version in CLIP_SHAPES:
        return _replaced(CLIP_SHAPES[version], overrides)
    path = Path(version) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"CLIP version {version!r}: neither a folder with a config.json nor one of {', '.join(CLIP_SHAPES)}; "
            f"download the model and pass its folder (building a model never downloads)"
        )
    config = load_json(path)
    text = config.get("text_config") or config
    if not isinstance(text, dict):
        raise ValueError(f"{path}: text_config is {text!r}; expected an object")
    return _replaced({key: text.get(key, value) for key, value in VIT_L_14.items()}, overrides)


def open_clip_shape(arch: str = OPEN_CLIP_ARCH, overrides: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the shape of an open_clip text tower, with some values replaced; ValueError for an unknown name."""
    if arch not in OPEN_CLIP_SHAPES:
        raise ValueError(f"arch {arch!r}: choose one of {', '.join(OPEN_CLIP_SHAPES)}")
    return _replaced(OPEN_CLIP_SHAPES[arch], overrides)


def _replaced(shape: Mapping[str, Any], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    if unknown := sorted(set(overrides or {}) - set(shape)):
        raise ValueError(f"text_config: {', '.join(unknown)}: not one of {', '.join(shape)}")
    return {**shape, **(overrides or {})}
