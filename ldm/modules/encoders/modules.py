"""Encoders of conditions: a class, a caption, a low-resolution picture or a map -> what the UNet attends to or is given as channels.

Importing this file is cheap: transformers, the tokenizers and their files come with the first use of what needs them.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.text_shapes import clip_shape
from ldm.modules.dtype import in_dtype, weights_dtype
from ldm.modules.encoders.base import AbstractEncoder, PretrainedEncoder
from ldm.modules.encoders.bert_tokenizer import BERTTokenizer
from ldm.modules.encoders.clip_joint import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.modules.encoders.clip_tokenizer import VOCAB_SIZE, clip_tokenizer
from ldm.modules.encoders.open_clip_text import FrozenOpenCLIPEmbedder
from ldm.modules.x_transformer import Encoder, TransformerWrapper

__all__ = [
    "AbstractEncoder",
    "BERTEmbedder",
    "CaptionEmbedder",
    "ClassEmbedder",
    "FrozenCLIPEmbedder",
    "FrozenCLIPTextEmbedder",
    "FrozenClipImageEmbedder",
    "FrozenOpenCLIPEmbedder",
    "HashedEmbedding",
    "SpatialRescaler",
    "TransformerEmbedder",
]

logger = logging.getLogger(__name__)


class ClassEmbedder(AbstractEncoder):
    """A learned vector for each class; the last class means "no class" in models trained for guidance (published: 1000 of 1001)."""

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__()
        self.key, self.n_classes = key, n_classes
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, Tensor], key: str | None = None) -> Tensor:
        """batch[key]: (B,) int64 in 0..n_classes-1 -> (B, 1, embed_dim). `key` stands in for the embedder's own."""
        key = key or self.key
        if key not in batch:
            raise ValueError(
                f"the batch has no {key!r}; it has {', '.join(batch)}; set cond_stage_config.params.key to the dataset's name"
            )
        labels = torch.as_tensor(batch[key], device=self.device)
        if labels.device.type == "cpu" and labels.numel():  # elsewhere the check would wait for the device
            low, high = labels.aminmax()
            if low < 0 or high >= self.n_classes:
                raise ValueError(
                    f"{key}: labels from {low} to {high}, but n_classes is {self.n_classes} (0 to {self.n_classes - 1})"
                )
        return self.embedding(labels[:, None])

    def unconditional_input(self, batch_size: int) -> dict[str, Tensor]:
        return {self.key: torch.full((batch_size,), self.n_classes - 1, device=self.device)}


class TransformerEmbedder(AbstractEncoder):
    """A trainable transformer over token ids."""

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int,
        max_seq_len: int = 77,
        device: str | None = None,
        heads: int = 8,
        dim_head: int = 64,
        embedding_dropout: float = 0.0,
        token_emb: nn.Module | None = None,
        logits: bool = True,
    ) -> None:
        """device: where to start, as in published configs; afterwards the module is moved like any other."""
        super().__init__()
        self.vocab_size, self.max_seq_len = vocab_size, max_seq_len
        self.transformer = TransformerWrapper(
            num_tokens=vocab_size,
            max_seq_len=max_seq_len,
            attn_layers=Encoder(n_embed, n_layer, heads=heads, dim_head=dim_head),
            emb_dropout=embedding_dropout,
            token_emb=token_emb,
            logits=logits,
        )
        if logits:  # in the published files, and never used: without this DDP waits for a gradient that cannot come
            self.transformer.to_logits.requires_grad_(False)
        if device is not None and self.device.type != "meta":
            self.to(device)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, L) int64, L <= max_seq_len -> (B, L, n_embed)."""
        return self.transformer(tokens.to(self.device), return_embeddings=True)


class BERTEmbedder(TransformerEmbedder):
    """The text encoder of LDM's text-to-image models: BERT's vocabulary, a transformer of its own (LDM, appendix E.2.1).

    With `use_tokenizer: false` the input is token ids already, as for layouts of bounding boxes.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        device: str | None = None,
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        tokenizer_path: str | Path | None = None,
    ) -> None:
        """tokenizer_path: a vocab.txt or a folder with one; None: the hub's bert-base-uncased, at the first text."""
        super().__init__(n_embed, n_layer, vocab_size, max_seq_len, device, embedding_dropout=embedding_dropout)
        self.tokenizer = BERTTokenizer(tokenizer_path, max_seq_len) if use_tokenizer else None

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """text: B texts, or (B, L) int64 token ids without a tokenizer -> (B, L, n_embed)."""
        return super().forward(self.tokenizer(text) if self.tokenizer is not None else text)

    def unconditional_input(self, batch_size: int) -> list[str] | Tensor:
        """Empty texts; without a tokenizer the last token alone, with which the builders of layouts fill up (an empty layout)."""
        if self.tokenizer is not None:
            return [""] * batch_size
        return torch.full((batch_size, self.max_seq_len), self.vocab_size - 1, device=self.device)


class HashedEmbedding(nn.Module):
    """A vector for each of many tokens from a table of few rows: the sum of two rows that hashes choose (arXiv 1709.03933).

    Two tokens share both rows with probability about 2 / rows**2, so in effect none do, at a cost that does not grow with the vocabulary.
    """

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, dim) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (...) int64 >= 0 -> (..., dim)."""
        return F.embedding(self.rows_of(tokens), self.weight).sum(-2) / math.sqrt(2)

    def rows_of(self, tokens: Tensor) -> Tensor:
        """The two rows of each token, (..., 2). The constants are part of every trained model: they never change."""
        hashes = (tokens * factor + offset for factor, offset in ((1_000_003, 12_345_701), (998_244_353, 67_867_979)))
        return torch.stack([value % 2_147_483_647 % self.weight.shape[0] for value in hashes], dim=-1)


class CaptionEmbedder(TransformerEmbedder):
    """A small trainable text encoder over CLIP's tokens, for models trained from scratch on captions; needs no download."""

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        max_seq_len: int = 77,
        vocab_rows: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        embedding_dropout: float = 0.0,
    ) -> None:
        """max_seq_len: begin and end take two; longer captions are cut with a warning. A short one makes cross-attention cheap.

        vocab_rows: None: a row for each of the 49,408 tokens. A number, e.g. 4096: hashed into that many rows (HashedEmbedding), for small
        models, whose optimizer would spend most of a step on rows of words that never occur.
        """
        token_emb = HashedEmbedding(vocab_rows, n_embed) if vocab_rows is not None else None
        super().__init__(
            n_embed,
            n_layer,
            VOCAB_SIZE,
            max_seq_len,
            None,
            heads,
            dim_head,
            embedding_dropout,
            token_emb=token_emb,
            logits=False,
        )

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """text: B texts -> (B, max_seq_len, n_embed)."""
        return self.encode_tokens(clip_tokenizer()(text, self.max_seq_len))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """tokens: (B, L) int64, begin, text, end and padding -> (B, L, n_embed)."""
        return super().forward(tokens)

    @property
    def max_length(self) -> int:
        return self.max_seq_len

    def unconditional_input(self, batch_size: int) -> list[str]:
        return [""] * batch_size


class SpatialRescaler(AbstractEncoder):
    """A picture or a map, scaled `n_stages` times by `multiplier`; with `out_channels` a 1x1 convolution maps its channels."""

    METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if n_stages < 0:
            raise ValueError(f"n_stages {n_stages}: 0 or more")
        if method not in self.METHODS:
            raise ValueError(f"method {method!r}: one of {', '.join(self.METHODS)}")
        self.n_stages, self.method, self.multiplier = n_stages, method, multiplier
        self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias) if out_channels is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W) -> (B, out_channels or in_channels, H * multiplier**n_stages, W * multiplier**n_stages)."""
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return in_dtype(weights_dtype(self), self.channel_mapper, x) if self.channel_mapper is not None else x


class FrozenCLIPEmbedder(PretrainedEncoder):
    """CLIP's text encoder as in Stable Diffusion v1: 77 tokens, the last layer after the final LayerNorm, never trained.

    Building it needs no network. Its weights are those of the loaded checkpoint; where it holds none, `ensure_weights` takes them from
    `version` as a local folder or from the hub.
    """

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: str | None = None,
        max_length: int = 77,
        text_config: Mapping[str, Any] | None = None,
    ) -> None:
        """text_config: values that replace those of `version`'s text model (hidden_size, num_hidden_layers, ...), for tiny models; these
        have no pretrained weights, so a checkpoint must hold them."""
        super().__init__()
        from ldm.modules.encoders.clip_text import CLIPText

        shape = clip_shape(version, text_config)
        if not 2 <= max_length <= shape["max_position_embeddings"]:
            raise ValueError(
                f"max_length {max_length}: from 2 to {shape['max_position_embeddings']}, the positions of {version}"
            )
        self.version, self.max_length, self.finds_own_weights = version, max_length, not text_config
        self.transformer = CLIPText(**shape)
        self.freeze()
        if device is not None and self.device.type != "meta":
            self.to(device)

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """text: B texts -> (B, max_length, D)."""
        return self.encode_tokens(clip_tokenizer()(text, self.max_length))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """tokens: (B, L) int64, begin, text, end and padding -> (B, L, D)."""
        return self.transformer(tokens.to(self.device))

    def unconditional_input(self, batch_size: int) -> list[str]:
        return [""] * batch_size

    def load_pretrained(self) -> None:
        """Read the weights from `version`: a local folder, else the hub. CheckpointError, in one line, where that fails."""
        from ldm.modules.encoders.clip_text import load_pretrained_text

        path = load_pretrained_text(self.transformer, self.version)
        self.has_weights = True
        logger.info("text encoder: weights of %s", path)
