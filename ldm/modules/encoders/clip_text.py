"""CLIP's text transformer (Radford et al. 2021, arXiv 2103.00020), with the module names of transformers'.

transformers' own class takes seconds to import, and its names differ between versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITION_IDS = "text_model.embeddings.position_ids"  # 0, 1, ..., 76; published files hold them
BEGIN_ID, END_ID = 49406, 49407


def quick_gelu(x: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 x), OpenAI's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class CLIPTextOutput(NamedTuple):
    """Output of CLIPTextModel."""

    last_hidden_state: Tensor  # after the final LayerNorm, (B, L, C)
    pooler_output: Tensor  # that of the end token, (B, C)
    hidden_states: tuple[Tensor, ...] | None  # of the embeddings and of each layer, before the final LayerNorm


class CLIPTextModel(nn.Module):
    """The text transformer under the published state-dict keys, text_model.*; `config` is its shape.

    shape: see `ldm.config.text_shapes.clip_shape`. Weights are random at first. Raises ValueError for an unknown
    activation or a width that is not a multiple of the heads.
    """

    def __init__(self, shape: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config = SimpleNamespace(**shape, bos_token_id=BEGIN_ID, eos_token_id=END_ID)
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {config.hidden_act!r}: choose one of {', '.join(ACTIVATIONS)}")
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"text_config: hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
                f"{config.num_attention_heads}"
            )
        self.text_model = _TextModel(config)
        self.register_state_dict_post_hook(_write_position_ids)
        self.register_load_state_dict_pre_hook(_drop_position_ids)

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> CLIPTextOutput:
        """input_ids: (B, L) int64; the other arguments are those of `text_model`."""
        return self.text_model(input_ids, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding, as transformers' model does; textual inversion replaces rows of it."""
        return self.text_model.embeddings.token_embedding


class _TextModel(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> CLIPTextOutput:
        """input_ids, position_ids: (B, L) int64; attention_mask: (B, L), 0 at tokens that none attends to."""
        x = self.embeddings(input_ids, position_ids)
        visible = None
        if attention_mask is not None:
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            visible = causal & attention_mask.bool()[:, None, None]  # (B, 1, L, L)
        last, hidden = self.encoder(x, visible, output_hidden_states)
        last = self.final_layer_norm(last)
        ends = (input_ids == END_ID).int().argmax(dim=-1)  # the first end token
        return CLIPTextOutput(last, last[torch.arange(len(last), device=last.device), ends], hidden)


class _Embeddings(nn.Module):
    position_ids: Tensor

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        for table in (self.token_embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=0.02)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None], persistent=False)

    def forward(
        self, input_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """input_ids: (B, L) int64, or their embeddings (B, L, C) -> (B, L, C)."""
        x = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        return x + self.position_embedding(self.position_ids[:, : x.shape[1]] if position_ids is None else position_ids)


class _Encoder(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """inputs_embeds: (B, L, C); mask: see _Layer -> the last output, and all of them if asked for."""
        x, states = inputs_embeds, [inputs_embeds]
        for layer in self.layers:
            x = layer(x, attention_mask)
            if output_hidden_states:
                states.append(x)
        return x, tuple(states) if output_hidden_states else None


class _Layer(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = _Attention(width, config.num_attention_heads, config.num_hidden_layers)
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = _MLP(config)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """hidden_states: (B, L, C); a mask (B, 1, L, L) replaces the causal one, True or 0 where a token attends."""
        x = hidden_states + self.self_attn(self.layer_norm1(hidden_states), attention_mask)
        return x + self.mlp(self.layer_norm2(x))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj = (nn.Linear(width, width) for _ in range(3))  # the published order
        self.out_proj = nn.Linear(width, width)
        for projection in (self.k_proj, self.v_proj, self.q_proj):
            _initialize(projection, (width * 2 * layers) ** -0.5)
        _initialize(self.out_proj, width**-0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, C / heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        width, self.activation = config.hidden_size, ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)
        _initialize(self.fc1, (2 * width) ** -0.5)
        _initialize(self.fc2, (width * 2 * config.num_hidden_layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def _initialize(layer: nn.Linear, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)


def _write_position_ids(module: CLIPTextModel, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state[prefix + POSITION_IDS] = module.text_model.embeddings.position_ids


def _drop_position_ids(module: CLIPTextModel, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Ignore the file's, which may be rounded to half precision; create those of a model built on meta."""
    state.pop(prefix + POSITION_IDS, None)
    embeddings = module.text_model.embeddings
    if embeddings.position_ids.is_meta:
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings, device="cpu")[None]
