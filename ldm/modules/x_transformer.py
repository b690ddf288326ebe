"""Transformers over tokens, in the shapes and names of the published text encoders (LDM appendix; after lucidrains' x-transformers)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import FeedForward


class AbsolutePositionalEmbedding(nn.Module):
    """One learned vector for each position."""

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)
        nn.init.normal_(self.emb.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, L, ...) -> the vectors of positions 0..L-1, (1, L, dim)."""
        return self.emb(torch.arange(x.shape[1], device=x.device))[None]


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself or, given `context`, to another. The heads' width is free of `dim`."""

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

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x: (B, L, dim), context: (B, M, dim), mask: (B, M) bool, True where a key may be seen -> (B, L, dim)."""
        source = x if context is None else context
        q, k, v = self._split(self.to_q(x)), self._split(self.to_k(source)), self._split(self.to_v(source))
        visible = None if mask is None else mask[:, None, None, :].expand(-1, 1, x.shape[1], -1)  # (B, 1, L, M)
        if self.causal and visible is not None:
            visible = visible & torch.ones(x.shape[1], source.shape[1], dtype=torch.bool, device=x.device).tril()
        out = F.scaled_dot_product_attention(  # (B, heads, L, dim_head)
            q,
            k,
            v,
            attn_mask=visible,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and visible is None,
        )
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, L, heads * dim_head) -> (B, heads, L, dim_head)


class Residual(nn.Module):
    """The sum around a layer: a module without weights, because the published names count it."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + residual


class AttentionLayers(nn.Module):
    """`depth` times attention and feed-forward, each with a LayerNorm before it and a sum around it. (B, L, dim) -> (B, L, dim).

    In names, `layers.2i` is the i-th attention (with `cross_attend` a level has three entries: attention, cross-attention, feed-forward)
    and an entry holds (norm, layer, sum) as 0, 1, 2.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int = 8,
        dim_head: int = 64,
        causal: bool = False,
        cross_attend: bool = False,
        ff_mult: int = 4,
        ff_glu: bool = False,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.depth = dim, depth
        self.kinds = (
            ("attention", "cross", "feedforward") * depth if cross_attend else ("attention", "feedforward") * depth
        )
        make = {
            "attention": lambda: Attention(dim, heads, dim_head, causal=causal, dropout=attn_dropout),
            "cross": lambda: Attention(dim, heads, dim_head, dropout=attn_dropout),
            "feedforward": lambda: FeedForward(dim, mult=ff_mult, glu=ff_glu, dropout=ff_dropout),
        }
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(dim), make[kind](), Residual()]) for kind in self.kinds)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        """x: (B, L, dim), context: (B, M, dim) for cross-attention; masks: bool, True where a token may be seen."""
        if ("cross" in self.kinds) != (context is not None):
            raise ValueError("a context is needed with cross_attend, and only then")
        for kind, (norm, layer, add) in zip(self.kinds, self.layers):
            if kind == "attention":
                x = add(layer(norm(x), mask=mask), x)
            elif kind == "cross":
                x = add(layer(norm(x), context, mask=context_mask), x)
            else:
                x = add(layer(norm(x)), x)
        return x


class Encoder(AttentionLayers):
    """Layers in which every token sees every other."""

    def __init__(self, dim: int, depth: int, **options: int | float | bool) -> None:
        super().__init__(dim, depth, causal=False, **options)


class Decoder(AttentionLayers):
    """Layers in which a token sees itself and those before it."""

    def __init__(self, dim: int, depth: int, **options: int | float | bool) -> None:
        super().__init__(dim, depth, causal=True, **options)


class TransformerWrapper(nn.Module):
    """Tokens -> embeddings plus positions -> layers -> LayerNorm -> logits, or the normalized embeddings before them."""

    def __init__(
        self,
        *,
        num_tokens: int,
        max_seq_len: int,
        attn_layers: AttentionLayers,
        emb_dropout: float = 0.0,
        use_pos_emb: bool = True,
        token_emb: nn.Module | None = None,
        logits: bool = True,
    ) -> None:
        """token_emb: (B, L) int64 -> (B, L, dim), in the place of a table of `num_tokens` rows. logits: False leaves out the last layer."""
        super().__init__()
        dim = attn_layers.dim
        self.max_seq_len, self.num_tokens = max_seq_len, num_tokens
        self.token_emb = token_emb if token_emb is not None else _token_table(num_tokens, dim)
        self.pos_emb = AbsolutePositionalEmbedding(dim, max_seq_len) if use_pos_emb else None
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.attn_layers = attn_layers
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens) if logits else None

    def forward(
        self, x: Tensor, return_embeddings: bool = False, mask: Tensor | None = None, **context: Tensor
    ) -> Tensor:
        """x: (B, L) int64 token ids, L <= max_seq_len -> (B, L, num_tokens), or (B, L, dim) with `return_embeddings`."""
        if x.shape[1] > self.max_seq_len:
            raise ValueError(f"{x.shape[1]} tokens in a sequence, at most {self.max_seq_len} (max_seq_len) fit")
        if self.to_logits is None and not return_embeddings:
            raise ValueError("built without logits: ask for return_embeddings")
        h = self.token_emb(x)  # (B, L, dim)
        if self.pos_emb is not None:
            h = h + self.pos_emb(x)
        h = self.norm(self.attn_layers(self.emb_dropout(h), mask=mask, **context))
        return h if return_embeddings else self.to_logits(h)


def _token_table(num_tokens: int, dim: int) -> nn.Embedding:
    table = nn.Embedding(num_tokens, dim)
    nn.init.normal_(table.weight, std=0.02)
    return table
