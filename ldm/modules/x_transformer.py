"""Token transformers with the shapes and keys of the published text encoders (after lucidrains' x-transformers)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.attention import FeedForward, attend


class AbsolutePositionalEmbedding(nn.Module):
    """One learned vector per position."""

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.emb = _normal_embedding(max_seq_len, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, L, ...) -> (1, L, dim), the vectors of positions 0 to L - 1."""
        return self.emb(torch.arange(x.shape[1], device=x.device))[None]


class Attention(nn.Module):
    """Multi-head self-attention; `heads * dim_head` may differ from `dim`."""

    def __init__(
        self, dim: int, heads: int = 8, dim_head: int = 64, causal: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, L, dim), mask: bool (B, L), True for visible tokens -> (B, L, dim)."""
        q, k, v = (rearrange(to(x), "b n (h d) -> b h n d", h=self.heads) for to in (self.to_q, self.to_k, self.to_v))
        out = attend(q, k, v, mask, self.causal, self.dropout if self.training else 0.0)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class Residual(nn.Module):
    """Residual sum; a module because the published keys count it."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + residual


class AttentionLayers(nn.Module):
    """`depth` times attention and feed-forward, each after a LayerNorm and with a residual connection.

    `layers.2i` is the i-th attention, `layers.2i+1` the i-th feed-forward; each holds (norm, layer, residual).
    """

    causal = False

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int = 8,
        dim_head: int = 64,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.depth = dim, depth
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention = Attention(dim, heads, dim_head, causal=self.causal, dropout=attn_dropout)
            for layer in (attention, FeedForward(dim, dropout=ff_dropout)):
                self.layers.append(nn.ModuleList([nn.LayerNorm(dim), layer, Residual()]))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, L, dim), mask: bool (B, L), True for visible tokens -> (B, L, dim)."""
        for block in self.layers:
            norm, layer, add = block.children()
            x = add(layer(norm(x), mask) if isinstance(layer, Attention) else layer(norm(x)), x)
        return x


class Encoder(AttentionLayers):
    """Layers with full attention."""


class Decoder(AttentionLayers):
    """Layers with causal attention: a token sees itself and earlier tokens."""

    causal = True


class TransformerWrapper(nn.Module):
    """Token and position embeddings, transformer layers, LayerNorm and the projection to logits.

    token_emb: module for (B, L) int64 -> (B, L, dim), instead of a table of `num_tokens` rows.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        max_seq_len: int,
        attn_layers: AttentionLayers,
        emb_dropout: float = 0.0,
        token_emb: nn.Module | None = None,
        logits: bool = True,
    ) -> None:
        super().__init__()
        dim = attn_layers.dim
        self.max_seq_len, self.num_tokens = max_seq_len, num_tokens
        self.token_emb = _normal_embedding(num_tokens, dim) if token_emb is None else token_emb
        self.pos_emb = AbsolutePositionalEmbedding(dim, max_seq_len)
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.attn_layers = attn_layers
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens) if logits else None

    def forward(self, x: Tensor, return_embeddings: bool = False, mask: Tensor | None = None) -> Tensor:
        """x: (B, L) int64, L <= max_seq_len -> logits (B, L, num_tokens), or (B, L, dim) with `return_embeddings`."""
        if x.shape[1] > self.max_seq_len:
            raise ValueError(
                f"{x.shape[1]} tokens per sequence: at most {self.max_seq_len} are supported (max_seq_len)"
            )
        h = self.token_emb(x) + self.pos_emb(x)  # (B, L, dim)
        h = self.norm(self.attn_layers(self.emb_dropout(h), mask=mask))  # (B, L, dim)
        if return_embeddings:
            return h
        if self.to_logits is None:
            raise ValueError("this transformer was built without logits: call it with return_embeddings=True")
        return self.to_logits(h)


def _normal_embedding(num_embeddings: int, dim: int) -> nn.Embedding:
    embedding = nn.Embedding(num_embeddings, dim)
    nn.init.normal_(embedding.weight, std=0.02)
    return embedding
