"""Condition encoders: a class, a caption, an image or a map -> context for cross-attention, or channels."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.types import Dropout, NonNegativeInt, PositiveFloat, PositiveInt
from ldm.modules.dtype import in_dtype, weights_dtype
from ldm.modules.encoders.base import AbstractEncoder, CLIPTokensEncoder
from ldm.modules.encoders.tokenizers import VOCAB_SIZE, BERTTokenizer
from ldm.modules.x_transformer import Encoder, TransformerWrapper
from ldm.published import published_names

# Imported on first use: the models of transformers and open_clip take about a second each, and few runs need them.
__getattr__ = published_names(__name__)


class ClassEmbedder(AbstractEncoder):
    """A learned vector per class. In models trained for guidance the last class means "no class" (1000 of 1001)."""

    def __init__(self, embed_dim: PositiveInt, n_classes: PositiveInt = 1000, key: str = "class") -> None:
        super().__init__()
        self.key, self.n_classes = key, n_classes
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, Tensor], key: str | None = None) -> Tensor:
        """batch[key]: (B,) int64 in 0..n_classes-1 -> (B, 1, embed_dim); `key` defaults to the embedder's own."""
        key = key or self.key
        if key not in batch:
            raise ValueError(
                f"the batch has no key {key!r}; it has {', '.join(batch)}. "
                "Set cond_stage_config.params.key to the dataset's key"
            )
        labels = torch.as_tensor(batch[key], device=self.device)
        if labels.device.type == "cpu" and labels.numel():  # on other devices the check would synchronize
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
        n_embed: PositiveInt,
        n_layer: PositiveInt,
        vocab_size: PositiveInt,
        max_seq_len: PositiveInt = 77,
        device: str | None = None,
        heads: PositiveInt = 8,
        dim_head: PositiveInt = 64,
        embedding_dropout: Dropout = 0.0,
        token_emb: nn.Module | None = None,
        logits: bool = True,
    ) -> None:
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
        if self.transformer.to_logits is not None:  # published but unused: DDP would wait for its gradient
            self.transformer.to_logits.requires_grad_(False)
        self._start_on(device)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, L) int64, L <= max_seq_len -> (B, L, n_embed)."""
        return self.transformer(tokens.to(self.device), return_embeddings=True)


class BERTEmbedder(TransformerEmbedder):
    """Text encoder of LDM's text-to-image models: BERT's vocabulary, a transformer trained with them (appendix E.2.1).

    With `use_tokenizer: false` it encodes token ids, such as layouts of bounding boxes.
    """

    def __init__(
        self,
        n_embed: PositiveInt,
        n_layer: PositiveInt,
        vocab_size: PositiveInt = 30522,
        max_seq_len: PositiveInt = 77,
        device: str | None = None,
        use_tokenizer: bool = True,
        embedding_dropout: Dropout = 0.0,
        tokenizer_path: str | Path | None = None,
    ) -> None:
        """tokenizer_path: a vocab.txt or a folder with one; None: bert-base-uncased of the hub, at the first call."""
        super().__init__(n_embed, n_layer, vocab_size, max_seq_len, device, embedding_dropout=embedding_dropout)
        self.use_tknz_fn = use_tokenizer
        if use_tokenizer:
            self.tknz_fn = BERTTokenizer(tokenizer_path, max_seq_len)

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """text: B texts, or (B, L) int64 token ids -> (B, L, n_embed)."""
        return super().forward(text if isinstance(text, Tensor) else self.tknz_fn(text))

    def warn_of_long_texts(self, texts: Iterable[str]) -> None:
        if self.use_tknz_fn:
            self.tknz_fn(list(dict.fromkeys(texts)))

    def unconditional_input(self, batch_size: int) -> list[str] | Tensor:
        """Return empty texts, or without a tokenizer empty layouts: sequences of the last token."""
        if self.use_tknz_fn:
            return [""] * batch_size
        return torch.full((batch_size, self.max_seq_len), self.vocab_size - 1, device=self.device)


class HashedEmbedding(nn.Module):
    """Embedding of many tokens by a table of few rows: the sum of two rows selected by hashes (arXiv 1709.03933).

    Two tokens share both rows with a negligible probability of about 2 / rows**2.
    """

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, dim) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (...) int64 >= 0 -> (..., dim)."""
        return F.embedding(self.rows_of(tokens), self.weight).sum(-2) / math.sqrt(2)

    def rows_of(self, tokens: Tensor) -> Tensor:
        """Return the two rows of each token, (..., 2). The constants are part of every trained model."""
        hashes = (tokens * factor + offset for factor, offset in ((1_000_003, 12_345_701), (998_244_353, 67_867_979)))
        return torch.stack([value % 2_147_483_647 % self.weight.shape[0] for value in hashes], dim=-1)


class CaptionEmbedder(CLIPTokensEncoder, TransformerEmbedder):
    """A small trainable text encoder over CLIP's tokens, for models trained from scratch; needs no download."""

    def __init__(
        self,
        n_embed: PositiveInt,
        n_layer: PositiveInt,
        max_seq_len: PositiveInt = 77,
        vocab_rows: PositiveInt | None = None,
        heads: PositiveInt = 8,
        dim_head: PositiveInt = 64,
        embedding_dropout: Dropout = 0.0,
    ) -> None:
        """max_seq_len: tokens, begin and end included; fewer make cross-attention cheaper.

        vocab_rows: None for one row per token; an integer, e.g. 4096, hashes the 49,408 tokens into that many rows:
        in small models the optimizer would spend most of a step on rows of words that never occur.
        """
        token_emb = HashedEmbedding(vocab_rows, n_embed) if vocab_rows is not None else None
        super().__init__(
            n_embed, n_layer, VOCAB_SIZE, max_seq_len, None, heads, dim_head, embedding_dropout, token_emb, logits=False
        )
        self.max_length = max_seq_len

    def token_table(self) -> nn.Module:
        return self.transformer.token_emb

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        return TransformerEmbedder.forward(self, tokens)


class SpatialRescaler(AbstractEncoder):
    """An image or map, scaled `n_stages` times by `multiplier`, then mapped to `out_channels` by a 1x1 convolution."""

    METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")

    def __init__(
        self,
        n_stages: NonNegativeInt = 1,
        method: str = "bilinear",
        multiplier: PositiveFloat = 0.5,
        in_channels: PositiveInt = 3,
        out_channels: PositiveInt | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if method not in self.METHODS:
            raise ValueError(f"method {method!r}: choose one of {', '.join(self.METHODS)}")
        self.n_stages, self.method, self.multiplier = n_stages, method, multiplier
        self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias) if out_channels is not None else None

    def rescale(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W) -> (B, in_channels, H * s, W * s), s = multiplier**n_stages."""
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W) -> (B, out_channels or in_channels, H * s, W * s), s = multiplier**n_stages."""
        x = self.rescale(x)
        return in_dtype(weights_dtype(self), self.channel_mapper, x) if self.channel_mapper is not None else x
