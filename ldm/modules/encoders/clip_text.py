"""CLIP's text transformer, built without network under the names of the published checkpoints, and its pretrained weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import CheckpointError, read_weights

VIT_L_14: dict[str, Any] = {  # openai/clip-vit-large-patch14, config.json, text_config
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
KNOWN_SHAPES: dict[str, dict[str, Any]] = {"openai/clip-vit-large-patch14": VIT_L_14}
POSITION_IDS = "text_model.embeddings.position_ids"
_FILES = ("model.safetensors", "pytorch_model.bin")


class CLIPText(nn.Module):
    """Holds transformers' CLIPTextModel as `text_model`, the published name, which transformers itself dropped in 5.6.

    `position_ids` is saved, since published files hold it, and made anew on loading: some files lack it, in others it was rounded.
    """

    def __init__(self, **shape: Any) -> None:
        super().__init__()
        from transformers import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPTextModel

        model = CLIPTextModel(CLIPTextConfig(**shape))
        self.text_model = model.text_model if hasattr(model, "text_model") else model
        self.text_model.embeddings.register_buffer("position_ids", self._positions(), persistent=True)
        self.register_load_state_dict_pre_hook(self._renew_positions)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, L) int64 -> the last layer's output after the final LayerNorm, (B, L, D)."""
        return self.text_model(input_ids=tokens).last_hidden_state

    def _positions(self) -> Tensor:
        return torch.arange(self.text_model.embeddings.position_embedding.num_embeddings)[None]

    @staticmethod
    def _renew_positions(module: "CLIPText", state: dict[str, Any], prefix: str, *_: Any) -> None:
        if any(name.startswith(prefix) for name in state):
            state[prefix + POSITION_IDS] = module._positions()


def shape_of(version: str) -> dict[str, Any]:
    """The text model's shape for a hub name or a local folder (its config.json).

    Raises ValueError for a hub name whose shape is unknown, since building a model never downloads.
    """
    if version in KNOWN_SHAPES:
        return KNOWN_SHAPES[version]
    if (Path(version) / "config.json").is_file():
        import json

        config = json.loads((Path(version) / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config") or config
        return {key: text.get(key, value) for key, value in VIT_L_14.items()} | {"bos_token_id": 49406, "eos_token_id": 49407}
    raise ValueError(
        f"CLIP version {version!r}: neither a folder with a config.json nor one of {', '.join(KNOWN_SHAPES)}; "
        f"download it and give the folder, so that building the model needs no network"
    )


def load_pretrained_text(module: CLIPText, version: str) -> Path:
    """Fill `module` from a local folder or, where `version` is none, from the hub (its cache first) -> the file that was read.

    Raises CheckpointError where the weights are nowhere to be had or do not fit.
    """
    path = _weights_file(version)
    weights = {_inner(name): tensor for name, tensor in read_weights(path).items()}
    wanted = {name: tensor for name, tensor in module.state_dict().items() if name != POSITION_IDS}
    lacking = [name for name, tensor in wanted.items() if name not in weights or weights[name].shape != tensor.shape]
    if lacking:
        raise CheckpointError(f"{path}: {len(lacking)} of the text model's {len(wanted)} weights are missing or differ in shape: {lacking[0]}")
    on_meta = any(tensor.is_meta for tensor in wanted.values())
    found = {name: weights[name].to(tensor.dtype) for name, tensor in wanted.items()}
    module.load_state_dict(found, assign=on_meta)
    return path


def _inner(name: str) -> str:
    """A name of a CLIP file, of whatever transformers version, as CLIPText has it."""
    name = name.removeprefix("transformer.")
    return name if name.startswith("text_model.") else f"text_model.{name}"


def _weights_file(version: str) -> Path:
    folder = Path(version)
    if folder.is_dir():
        for name in _FILES:
            if (folder / name).is_file():
                return folder / name
        raise CheckpointError(f"{folder}: holds none of {', '.join(_FILES)}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(version, _FILES[0]))
    except Exception as error:  # the hub's client fails in many ways, and all of them mean that the file is not to be had
        raise CheckpointError(
            f"the weights of {version} are in no loaded checkpoint, not in the hub's cache and not to be downloaded "
            f"({type(error).__name__}); load a checkpoint that holds them, or give a local folder: cond_stage_config.params.version"
        ) from error


def text_shape(version: str, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """The shape of `version` with some values replaced; ValueError for a value that is no part of a shape."""
    unknown = sorted(set(overrides or {}) - set(VIT_L_14))
    if unknown:
        raise ValueError(f"text_config: {', '.join(unknown)}: not one of {', '.join(VIT_L_14)}")
    return {**shape_of(version), **(overrides or {})}
