"""Conditioning from prompts with emphasis and from long prompts, for encoders of CLIP's tokens; off by default.

Not part of the published models; syntax (ldm.inference.emphasis) and arithmetic are those of AUTOMATIC1111's web UI
(https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features, "Infinite prompt length").

Emphasis multiplies each token's embedding z_i by its weight w_i and restores the mean over all tokens and channels of a
chunk: z'_i = w_i z_i * mean(z) / mean(w z).

A long prompt is split into chunks of 75 tokens, each with a begin and an end token, that are encoded separately and
joined along the token axis. A shorter prompt (e.g. the negative one) is filled up with chunks of the empty prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.inference.emphasis import Part, parse_emphasis
from ldm.modules.encoders.base import CLIPTokensEncoder
from ldm.modules.encoders.tokenizers import VOCAB_SIZE, AddedTokens, clip_tokenizer

_SMALL_MEAN = 1e-3  # of the standard deviation: a smaller mean is noise and not restored


class Token(NamedTuple):
    id: int
    weight: float


class PromptEncoder:
    """Conditioning of prompts with emphasis, in chunks, or both."""

    def __init__(self, encoder: CLIPTokensEncoder, emphasis: bool = False, long_prompts: bool = False) -> None:
        if not callable(getattr(encoder, "encode_tokens", None)):
            raise ValueError(
                f"--emphasis and --long_prompts need a text encoder of CLIP's tokens, not {type(encoder).__name__}"
            )
        self.encoder, self.emphasis, self.long_prompts = encoder, emphasis, long_prompts
        self.tokenizer = clip_tokenizer()
        self.added: AddedTokens = encoder.token_embeddings.ids if isinstance(encoder, CLIPTokensEncoder) else {}
        self.room = encoder.max_length - 2

    def chunks_for(self, prompts: Iterable[str]) -> int:
        """Number of chunks that the longest prompt needs, at least 1."""
        if not self.long_prompts:
            return 1
        return max(1, *(len(self._chunks(self.tokens(prompt))) for prompt in prompts))

    def warn_of_long_texts(self, prompts: Iterable[str]) -> None:
        """Log one warning for the prompts that are truncated without `long_prompts`."""
        if not self.long_prompts:
            each = list(dict.fromkeys(prompts))
            with self.tokenizer.truncation.batch(len(each)):
                for prompt in each:
                    self._split(prompt, 1)

    def __call__(self, prompts: Sequence[str], chunks: int = 1) -> Tensor:
        """Encode B prompts -> (B, chunks * max_length, D); raise ValueError if one needs more chunks."""
        rows = [self._split(prompt, chunks) for prompt in prompts]
        return torch.cat([self._encode([row[k] for row in rows]) for k in range(chunks)], dim=1)

    def tokens(self, prompt: str) -> list[Token]:
        """The prompt's tokens with their weights, without begin and end."""
        parts = parse_emphasis(prompt) if self.emphasis else [Part(prompt, 1.0)]
        return [Token(i, part.weight) for part in parts for i in self.tokenizer.encode(part.text, self.added)]

    def _chunks(self, tokens: Sequence[Token]) -> list[list[Token]]:
        """Split tokens into chunks; the vectors of an added token stay together."""
        first = {ids[0] for ids in self.added.values()}
        chunks: list[list[Token]] = []
        room, word = 0, []
        for k, token in enumerate(tokens):
            word.append(token)
            if k + 1 < len(tokens) and (following := tokens[k + 1].id) >= VOCAB_SIZE and following not in first:
                continue
            if room < len(word):
                chunks.append([])
                room = self.room
            chunks[-1] += word
            room, word = room - len(word), []
        return chunks

    def _split(self, prompt: str, chunks: int) -> list[list[Token]]:
        tokens = self.tokens(prompt)
        if not self.long_prompts:
            if len(tokens) > self.room:
                dropped = [token.id for token in tokens[self.room :]]
                self.tokenizer.truncation.add(prompt, self.room, partial(self.tokenizer.decode, dropped, self.added))
            return [tokens[: self.room]]
        found = self._chunks(tokens)
        if len(found) > chunks:
            raise ValueError(f"a prompt of {len(tokens)} tokens needs more than {chunks} chunks of {self.room}")
        return found + [[] for _ in range(chunks - len(found))]

    def _encode(self, rows: list[list[Token]]) -> Tensor:
        """One chunk of each prompt -> (B, max_length, D)."""
        first, last, pad = self.tokenizer.begin_id, self.tokenizer.end_id, self.encoder.pad_id
        ids = torch.full((len(rows), self.encoder.max_length), last if pad is None else pad, dtype=torch.int64)
        weights = torch.ones(ids.shape)
        for i, row in enumerate(rows):
            ids[i, : len(row) + 2] = torch.tensor([first, *(token.id for token in row), last])
            weights[i, 1 : len(row) + 1] = torch.tensor([token.weight for token in row])
        z = self.encoder.encode_tokens(ids)
        return z if bool((weights == 1.0).all()) else weighted(z, weights.to(z.device))


def weighted(z: Tensor, weights: Tensor) -> Tensor:
    """Embeddings z (B, L, D) times weights (B, L), rescaled so that each row keeps its mean.

    Rows whose mean is near 0 or changes its sign are not rescaled.
    """
    plain = z.float()
    scaled = plain * weights[..., None]
    mean, new = (x.flatten(1).mean(dim=1) for x in (plain, scaled))
    smallest = _SMALL_MEAN * plain.flatten(1).std(dim=1)
    usable = (mean * new > 0) & (mean.abs() > smallest) & (new.abs() > smallest)
    ratio = torch.where(usable, mean / torch.where(usable, new, 1.0), 1.0)
    ratio = torch.where((weights == 1.0).all(dim=1), 1.0, ratio)  # a row without emphasis keeps its exact values
    return (scaled * ratio[:, None, None]).to(z.dtype)
