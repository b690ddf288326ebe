"""Token merging: self-attention of fewer tokens, similar ones being averaged (ToMe for SD, arXiv 2303.17604)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import CrossAttention, SpatialTransformer

CELL = 2  # one token of each 2x2 is a destination, the others are sources


@contextmanager
def token_merging(unet: nn.Module, ratio: float) -> Iterator[None]:
    """Context in which self-attention at the finest level that has it merges the `ratio` of its tokens, 0 to 0.75.

    At 0 nothing changes. Random numbers of a run are not used. Raises ValueError for a network without such attention,
    and for a compiled one.
    """
    if not ratio:
        yield
        return
    found = [layer for layer in unet.modules() if isinstance(layer, SpatialTransformer) and _self_attention(layer)]
    if not found:
        raise ValueError(f"token merging: {type(unet).__name__} has no spatial transformer with self-attention")
    if unet._compiled_call_impl is not None:
        raise ValueError("token merging: not supported by a compiled network, which ignores hooks")
    hooks = _Hooks(found[0], ratio)
    with ExitStack() as stack:
        for transformer in found:
            stack.callback(transformer.register_forward_pre_hook(hooks.enter).remove)
            for attention in _self_attention(transformer):
                stack.callback(attention.register_forward_pre_hook(hooks.merge).remove)
                stack.callback(attention.register_forward_hook(hooks.unmerge).remove)
        yield


def _self_attention(transformer: SpatialTransformer) -> list[CrossAttention]:
    blocks: Iterable[Any] = transformer.transformer_blocks
    return [block.attn1 for block in blocks if not block.disable_self_attn]


class _Hooks:
    """Forward hooks of the transformers and their self-attention; `first` is the one that each network call reaches
    first, so its feature map is the finest.
    """

    def __init__(self, first: nn.Module, ratio: float) -> None:
        self.first, self.ratio = first, ratio
        self.generator = torch.Generator().manual_seed(0)
        self.finest = self.size = (0, 0)
        self.match: Match | None = None

    def enter(self, transformer: nn.Module, inputs: tuple[Any, ...]) -> None:
        height, width = inputs[0].shape[2:]
        self.size = height, width
        if transformer is self.first:
            self.finest = self.size

    def merge(self, attention: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        self.match = None
        if self.size != self.finest or min(self.size) < CELL:
            return inputs
        x = inputs[0]  # (B, HW, C)
        sources, destinations = (part.to(x.device, non_blocking=True) for part in partition(*self.size, self.generator))
        self.match = match_tokens(x, sources, destinations, self.ratio)
        return self.match.merge(x), *inputs[1:]

    def unmerge(self, attention: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output if self.match is None else self.match.unmerge(output)


def partition(height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places of the sources and of the destinations, a random one of each 2x2, among height x width tokens.

    A last odd row or column has sources only.
    """
    rows, columns = torch.meshgrid(torch.arange(0, height - 1, CELL), torch.arange(0, width - 1, CELL), indexing="ij")
    within = torch.randint(CELL**2, (rows.numel(),), generator=generator)
    destinations = (rows.flatten() + within // CELL) * width + columns.flatten() + within % CELL
    is_source = torch.ones(height * width, dtype=torch.bool).index_fill(0, destinations, False)
    return is_source.nonzero()[:, 0], destinations


class Match(NamedTuple):
    """Which sources are merged, and each into which destination. Places: sources (S,), destinations (D,).

    kept: (B, S - r) and merged: (B, r), indices of sources; target: (B, r), indices of destinations.
    """

    sources: Tensor
    destinations: Tensor
    kept: Tensor
    merged: Tensor
    target: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """(B, S + D, C) -> (B, S + D - r, C): the kept sources, then each destination averaged with those it takes."""
        sources, destinations = x[:, self.sources], x[:, self.destinations]
        moved, into = sources.gather(1, _rows(self.merged, x)), _rows(self.target, x)
        averaged = destinations.scatter_reduce(1, into, moved, "mean", include_self=True)
        return torch.cat([sources.gather(1, _rows(self.kept, x)), averaged], dim=1)

    def unmerge(self, y: Tensor) -> Tensor:
        """(B, S + D - r, C) -> (B, S + D, C): all tokens in their places, a merged one as a copy of its destination."""
        kept, destinations = y.split([self.kept.shape[1], len(self.destinations)], dim=1)
        copies = destinations.gather(1, _rows(self.target, y))
        order = torch.cat([self.kept, self.merged], dim=1)  # (B, S)
        sources = torch.cat([kept, copies], dim=1).gather(1, _rows(order.argsort(dim=1), y))
        place = torch.cat([self.sources, self.destinations]).argsort()  # (S + D,)
        return torch.cat([sources, destinations], dim=1)[:, place]


def _rows(index: Tensor, x: Tensor) -> Tensor:
    return index[:, :, None].expand(-1, -1, x.shape[2])


def match_tokens(x: Tensor, sources: Tensor, destinations: Tensor, ratio: float) -> Match:
    """Bipartite soft matching (section 3): merge the sources whose nearest destination is most similar by the cosine.

    x: (B, N, C), of which each sample has its own match; `ratio` of the N tokens are merged, at most all sources.
    """
    unit = F.normalize(x, dim=-1)
    similarity, nearest = (unit[:, sources] @ unit[:, destinations].transpose(1, 2)).max(dim=-1)  # (B, S)
    order = similarity.argsort(dim=-1, descending=True, stable=True)
    r = min(int(ratio * x.shape[1]), len(sources))
    merged, kept = order.split([r, len(sources) - r], dim=1)
    return Match(sources, destinations, kept, merged, nearest.gather(1, merged))
