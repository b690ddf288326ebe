"""CLIP's text encoder as in Stable Diffusion v1 (Radford et al. 2021, arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from ldm.config.text_shapes import CLIP_VERSION, clip_shape
from ldm.config.types import PathText, PositiveInt
from ldm.modules.encoders.base import CLIPTokensEncoder, PretrainedEncoder, file_from_hub, file_in_folder
from ldm.modules.encoders.clip_text import CLIPTextModel
from ldm.modules.encoders.tokenizers import clip_tokenizer

if TYPE_CHECKING:
    import transformers

_FILES = ("model.safetensors", "pytorch_model.bin")


class FrozenCLIPEmbedder(CLIPTokensEncoder, PretrainedEncoder):
    """CLIP's text encoder as in Stable Diffusion v1: 77 tokens, the last layer after the final LayerNorm, frozen.

    Building it needs no network. If the checkpoint does not hold its weights, `ensure_weights` loads them from
    `version`, a local folder or a repository of the hub.
    """

    def __init__(
        self,
        version: PathText = CLIP_VERSION,
        device: str | None = None,
        max_length: PositiveInt = 77,
        text_config: Mapping[str, Any] | None = None,
        freeze: bool = True,
        layer: Literal["last", "pooled", "hidden"] = "last",
        layer_idx: int | None = None,
    ) -> None:
        """text_config: overrides of the shape, for tiny models; a checkpoint must hold their weights.

        freeze: False trains it with a LatentDiffusion of `cond_stage_trainable`.
        layer: `last` is after the final LayerNorm, `pooled` its end token alone (B, 1, C), `hidden` the output of layer
        `layer_idx` before that LayerNorm; 0 is the embedding, -1 the last layer.
        """
        super().__init__()
        shape = clip_shape(version, text_config)
        positions = shape["max_position_embeddings"]
        if not 2 <= max_length <= positions:
            raise ValueError(f"max_length {max_length}: choose 2 to {positions}, the positions of {version}")
        layers = shape["num_hidden_layers"]
        if (layer == "hidden") != (layer_idx is not None) or not -layers - 1 <= (layer_idx or 0) <= layers:
            raise ValueError(f"layer_idx {layer_idx}: layer {layer!r}; layer 'hidden' takes {-layers - 1} to {layers}")
        self.layer, self.layer_idx = layer, layer_idx
        self.version, self.max_length, self.finds_own_weights = version, max_length, not text_config
        self.transformer = CLIPTextModel(shape)
        if freeze:
            self.freeze()
        self._start_on(device)

    @property
    def tokenizer(self) -> transformers.CLIPTokenizer:
        """transformers' tokenizer; `forward` cleans the text first."""
        return clip_tokenizer().tokenizer

    def token_table(self) -> nn.Module:
        return self.transformer.get_submodule("text_model.embeddings.token_embedding")

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        found = self.transformer(input_ids=tokens.to(self.device), output_hidden_states=self.layer == "hidden")
        if self.layer == "pooled":
            return found.pooler_output[:, None]
        return found.last_hidden_state if self.layer_idx is None else found.hidden_states[self.layer_idx]

    def load_pretrained(self) -> None:
        folder = Path(self.version)
        if folder.is_dir():
            path = file_in_folder(folder, _FILES)
        else:
            advice = "use a checkpoint that holds them, or set cond_stage_config.params.version to a local folder"
            path = file_from_hub(self.version, _FILES[0], advice)
        self._load(self.transformer, path, _published_name)


def _published_name(key: str) -> str:
    """Return a key of a CLIP file of any transformers version as text_model.*."""
    key = key.removeprefix("transformer.")
    return key if key.startswith("text_model.") else f"text_model.{key}"
