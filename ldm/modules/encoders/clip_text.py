"""CLIP's text transformer (Radford et al. 2021, arXiv 2103.00020) in the published names, and its pretrained weights.

Written here rather than taken from transformers, whose model goes by other names from 5.6 on, takes eight seconds to import, and cannot be
imported at all where torchvision does not fit torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.encoders.weights import fill, from_hub, in_folder

POSITION_IDS = "text_model.embeddings.position_ids"
_FILES = ("model.safetensors", "pytorch_model.bin")


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation x * sigmoid(1.702 x) that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Embeddings(nn.Module):
    """Token plus position. `position_ids` is a buffer because published files hold it."""

    def __init__(self, vocab_size: int, dim: int, positions: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.position_embedding = nn.Embedding(positions, dim)
        self.register_buffer("position_ids", torch.arange(positions)[None])
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, L) int64 -> (B, L, D)."""
        return self.token_embedding(tokens) + self.position_embedding(self.position_ids[:, : tokens.shape[1]])


class SelfAttention(nn.Module):
    """Each token attends to itself and those before it. (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, L, D / heads)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int, inner: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Attention and MLP, each with a LayerNorm before it and a sum around it."""

    def __init__(self, dim: int, heads: int, inner: int, activation: str, eps: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, heads)
        self.layer_norm1 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, inner, activation)
        self.layer_norm2 = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPText(nn.Module):
    """The text model under its published names: text_model.{embeddings, encoder.layers.N, final_layer_norm}."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        max_position_embeddings: int,
        hidden_act: str,
        layer_norm_eps: float,
    ) -> None:
        super().__init__()
        if hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {hidden_act!r}: one of {', '.join(ACTIVATIONS)}")
        if hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size {hidden_size}: no multiple of num_attention_heads {num_attention_heads}")
        layers = (
            Layer(hidden_size, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps)
            for _ in range(num_hidden_layers)
        )
        self.text_model = nn.Module()
        self.text_model.embeddings = Embeddings(vocab_size, hidden_size, max_position_embeddings)
        self.text_model.encoder = nn.Module()
        self.text_model.encoder.layers = nn.ModuleList(layers)
        self.text_model.final_layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.register_load_state_dict_pre_hook(self._renew_positions)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, L) int64 -> the last layer's output after the final LayerNorm, (B, L, D)."""
        x = self.text_model.embeddings(tokens)
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        return self.text_model.final_layer_norm(x)

    @staticmethod
    def _renew_positions(module: "CLIPText", state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Some files lack position_ids, in others they were rounded to half precision: 0, 1, 2, ... whatever the file says."""
        if any(name.startswith(prefix) for name in state):
            state[prefix + POSITION_IDS] = torch.arange(module.text_model.embeddings.position_embedding.num_embeddings)[
                None
            ]


def load_pretrained_text(module: CLIPText, version: str) -> Path:
    """Fill `module` from a local folder or, where `version` is none, from the hub (its cache first) -> the file that was read.

    Raises CheckpointError where the weights are nowhere to be had or do not fit.
    """
    path = _weights_file(version)
    fill(module, path, "the text model", _inner, but=[POSITION_IDS])
    return path


def _inner(name: str) -> str:
    """A name of a CLIP file, of whatever transformers version, as CLIPText has it."""
    name = name.removeprefix("transformer.")
    return name if name.startswith("text_model.") else f"text_model.{name}"


def _weights_file(version: str) -> Path:
    folder = Path(version)
    if folder.is_dir():
        return in_folder(folder, _FILES)
    otherwise = "load a checkpoint that holds them, or give a local folder: cond_stage_config.params.version"
    return from_hub(version, _FILES[0], f"the weights of {version}", otherwise)
