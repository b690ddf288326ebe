"""CLIP's and OpenCLIP's text towers as transformers' CLIPTextModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm.checkpoint.diffusers.rules import STACKED, ConversionError, Rule, same, same_layers
from ldm.config.text_shapes import CLIP_VERSION, OPEN_CLIP_ARCH, clip_shape, open_clip_shape

CLIP, OPEN_CLIP = "FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder"
PREFIX = {CLIP: "cond_stage_model.transformer.", OPEN_CLIP: "cond_stage_model.model."}
POSITION_IDS = f"{PREFIX[CLIP]}text_model.embeddings.position_ids"
_ACTIVATION = {CLIP: "quick_gelu", OPEN_CLIP: "gelu"}
_CLIP_ATTENTION = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out"))
_CLIP_LAYER = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *_CLIP_ATTENTION)
_OPEN_CLIP_LAYER = (
    *(("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("attn.out_proj", "self_attn.out_proj")),
    *(("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")),
)
_FIELDS = {  # of TextLayout -> key and default in transformers' config
    "vocab_size": ("vocab_size", 49408),
    "width": ("hidden_size", 512),
    "inner": ("intermediate_size", 2048),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 8),
    "positions": ("max_position_embeddings", 77),
    "activation": ("hidden_act", "quick_gelu"),
    "eps": ("layer_norm_eps", 1e-5),
}


class TextLayout(NamedTuple):
    """Shape of the tower. `layers` counts those in use: Stable Diffusion v2 skips OpenCLIP's last one."""

    kind: str  # CLIP or OPEN_CLIP
    vocab_size: int
    width: int
    inner: int
    layers: int
    heads: int
    positions: int
    activation: str
    eps: float = 1e-5

    @classmethod
    def from_params(cls, kind: str, params: Mapping[str, Any]) -> TextLayout:
        """From the `params` of our embedder; kind: CLIP or OPEN_CLIP."""
        if kind == CLIP:
            shape = clip_shape(params.get("version", CLIP_VERSION), params.get("text_config"))
            return cls(CLIP, *(shape[key] for key, _ in _FIELDS.values()))
        shape = open_clip_shape(params.get("arch", OPEN_CLIP_ARCH), params.get("text_config"))
        layers, width = shape["layers"] - (params.get("layer", "last") == "penultimate"), shape["width"]
        sizes = (shape["vocab_size"], width, 4 * width, layers, shape["heads"], shape["context_length"])
        return cls(OPEN_CLIP, *sizes, "gelu")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], kind: str | None = None) -> TextLayout:
        """From text_encoder/config.json. kind: None tells the towers apart by activation; quick_gelu is OpenAI's."""
        where = "text_encoder/config.json"
        if "CLIPTextModel" not in (config.get("architectures") or ["CLIPTextModel"]):
            raise ConversionError(f"{where}: {config['architectures']} is not supported; expected CLIPTextModel")
        activation = config.get("hidden_act", "quick_gelu")
        if activation not in _ACTIVATION.values():
            raise ConversionError(f"{where}: hidden_act {activation}: choose one of {', '.join(_ACTIVATION.values())}")
        kind = kind or (CLIP if activation == "quick_gelu" else OPEN_CLIP)
        return cls(kind, *(config.get(key, default) for key, default in _FIELDS.values()))

    def config(self) -> dict[str, Any]:
        """text_encoder/config.json."""
        return {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            **{key: getattr(self, field) for field, (key, _) in _FIELDS.items()},
            "projection_dim": 768 if self.kind == CLIP else 512,
            "attention_dropout": 0.0,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 49407 if self.kind == CLIP else 0,
        }

    def rules(self) -> list[Rule]:
        """Every tensor's rule."""
        return self._clip_rules() if self.kind == CLIP else self._open_clip_rules()

    def _clip_rules(self) -> list[Rule]:
        names = [f"embeddings.{name}_embedding.weight" for name in ("token", "position")]
        layers = [f"encoder.layers.{n}.{layer}" for n in range(self.layers) for layer in _CLIP_LAYER]
        names += [f"{layer}.{leaf}" for layer in (*layers, "final_layer_norm") for leaf in ("weight", "bias")]
        return [Rule(f"text_model.{name}", (f"text_model.{name}",)) for name in names]

    def _open_clip_rules(self) -> list[Rule]:
        rules = same("token_embedding", "text_model.embeddings.token_embedding", ("weight",))
        rules += [Rule("positional_embedding", ("text_model.embeddings.position_embedding.weight",))]
        for n in range(self.layers):
            ours, theirs = f"transformer.resblocks.{n}", f"text_model.encoder.layers.{n}"
            for leaf in ("weight", "bias"):
                parts = tuple(f"{theirs}.self_attn.{name}_proj.{leaf}" for name in ("q", "k", "v"))
                rules.append(Rule(f"{ours}.attn.in_proj_{leaf}", parts, STACKED))
            rules += same_layers(ours, theirs, _OPEN_CLIP_LAYER)
        return rules + same("ln_final", "text_model.final_layer_norm")
