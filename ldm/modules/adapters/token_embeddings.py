"""New tokens of a text encoder, of one or several vectors: textual inversion (Gal et al. 2022, arXiv 2208.01618)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.types import PositiveInt
from ldm.modules.encoders.tokenizers import BEGIN, END, VOCAB_SIZE, clean


@dataclass(frozen=True)
class NewToken:
    """A token to train.

    token: its name in prompts and captions, e.g. <my-cat>. init: words whose embeddings it starts from, e.g. cat.
    vectors: number of its vectors; each takes the place of one token of the prompt.
    """

    token: str
    init: str
    vectors: PositiveInt = 1

    @property
    def stem(self) -> str:
        """The name without brackets, as the name of a file."""
        return re.sub(r"[^\w.-]+", "-", self.token).strip("-.") or "token"


class TokenEmbeddings(nn.Module):
    """Vectors of tokens that the vocabulary does not have; the table of the encoder itself never changes.

    ids: name of a token in prompts -> its ids, from VOCAB_SIZE on: one for each of its vectors. Names are lower case,
    as CLIP's tokens are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.ParameterList()  # (N, D) of each token
        self.ids: dict[str, range] = {}

    def add(self, names: Sequence[str], vectors: Tensor) -> None:
        """Add a token of N vectors (N, D) under one or several names. Raises ValueError for a name that is taken."""
        first = VOCAB_SIZE + sum(len(each) for each in self.vectors)
        ids = range(first, first + len(vectors))
        for name in dict.fromkeys(map(clean, names)):
            if not name:
                raise ValueError("token '': the name of a token must not be empty")
            if name in (BEGIN, END):
                raise ValueError(f"token {name!r}: this is a token of CLIP itself; choose another name")
            if name in self.ids:
                raise ValueError(f"token {name!r}: two tokens have this name; choose another for one of them")
            self.ids[name] = ids
        self.vectors.append(nn.Parameter(vectors))

    def attach(self, table: nn.Module) -> None:
        """Let the table of an encoder, (...) int64 -> (..., D), embed the new ids too."""
        if not isinstance(table.forward, partial):
            table.__dict__["forward"] = partial(self.embed, table.forward)

    def embed(self, table: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """Return the embeddings of tokens (...) int64, (..., D): those of the vocabulary are the table's."""
        new = tokens >= VOCAB_SIZE
        known = table(tokens.masked_fill(new, 0))
        rows = (tokens - VOCAB_SIZE).clamp(min=0)
        vectors = torch.cat(list(self.vectors)).to(known.dtype)
        return torch.where(new[..., None], F.embedding(rows, vectors), known)


def initial_vectors(embeddings: Tensor, count: int) -> Tensor:
    """Return `count` vectors for a new token from the embeddings (M, D) of words -> (count, D).

    With fewer words than vectors words repeat in their order, with more a vector is the mean of neighboring words.
    """
    words = len(embeddings)
    starts = [k * words // count for k in range(count)]
    ends = [max(start + 1, (k + 1) * words // count) for k, start in enumerate(starts)]
    return torch.stack([embeddings[start:end].mean(dim=0) for start, end in zip(starts, ends)])
