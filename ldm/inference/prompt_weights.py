"""Emphasis `(word:1.3)` and prompts of any length, for text encoders over CLIP's tokens. Both are off unless they are asked for.

Neither is part of the published models. The syntax and the arithmetic are those that users of Stable Diffusion know from AUTOMATIC1111's
web UI (https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features, "Attention/emphasis" and "Infinite prompt length"):

    (text)      1.1 times                   [text]      1 / 1.1 times
    (text:1.3)  1.3 times, 0 to 10          ((text))    brackets multiply: 1.21 times
    \\( \\) \\[ \\] \\: \\\\  the sign itself

With emphasis each token's embedding z_i is multiplied by its weight w_i, and the product brought back to the mean it had:
z'_i = w_i z_i * mean(z) / mean(w z), the means over all tokens and channels of a prompt's chunk.

A long prompt becomes chunks of 75 tokens, each with a begin and an end token, encoded alone and joined along the token axis; a shorter
prompt (the negative one, say) gets chunks of the empty prompt to have as many.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.modules.encoders.tokenizers import CLIPTokenizer

ROUND, SQUARE = 1.1, 1 / 1.1
MAX_WEIGHT = 10.0
_SPECIAL = re.compile(r"\\[()\[\]:\\]|[()\[\]:]")  # a bracket or a colon, or the escape of one
_ENDING = re.compile(r":\s*(|[-+.\d][^()\[\]]*)\)")  # what can only be meant as a weight
_WITHOUT_WEIGHT = 1e-3  # of the deviation: a mean nearer to 0 than this is noise, and no ratio is made of it


class Part(NamedTuple):
    """A piece of a prompt and how much it counts."""

    text: str
    weight: float


class Token(NamedTuple):
    id: int
    weight: float


# ------------------------------------------------------------------------------------------------------------------ emphasis


def parse_emphasis(prompt: str) -> list[Part]:
    """The prompt's pieces with their weights, brackets resolved; ValueError, in one line, for what cannot be meant."""
    parts: list[Part] = []
    opened: list[tuple[str, int, int]] = []  # bracket, where it is, number of parts before it
    text, at = "", 0

    def close(weight: float) -> None:
        _, _, first = opened.pop()
        parts[first:] = [Part(part.text, part.weight * weight) for part in parts[first:]]

    for match in _SPECIAL.finditer(prompt):
        if match.start() < at:  # within a weight that has been read
            continue
        text, at, sign = text + prompt[at : match.start()], match.end(), match[0]
        if sign[0] == "\\":
            text += sign[1]
        elif sign in "([":
            parts, text = _with(parts, text), ""
            opened.append((sign, match.start(), len(parts)))
        elif sign in ")]":
            if not opened or opened[-1][0] != {")": "(", "]": "["}[sign]:
                raise _wrong(prompt, f"nothing is open that {sign} at character {match.start() + 1} could close")
            parts, text = _with(parts, text), ""
            close(ROUND if sign == ")" else SQUARE)
        elif opened and opened[-1][0] == "(" and (ending := _ENDING.match(prompt, match.start())):
            parts, text, at = _with(parts, text), "", ending.end()
            close(_weight(ending[1], prompt))
        else:
            text += sign
    if opened:
        sign, where, _ = opened[0]
        raise _wrong(prompt, f"{sign} at character {where + 1} is never closed")
    return _with(parts, text + prompt[at:])


def check_emphasis(prompts: str | Iterable[str]) -> None:
    """ValueError for the first prompt whose emphasis cannot be read; needs neither torch nor a model."""
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        parse_emphasis(prompt)


def _with(parts: list[Part], text: str) -> list[Part]:
    return [*parts, Part(text, 1.0)] if text else parts


def _weight(text: str, prompt: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0.0 <= weight <= MAX_WEIGHT:
        raise _wrong(prompt, f"{':' + text!r} is no weight from 0 to {MAX_WEIGHT:g}")
    return weight


def _wrong(prompt: str, what: str) -> ValueError:
    return ValueError(
        f"--emphasis: {what} in {prompt!r}; write (words:1.3), and \\( \\) \\[ \\] \\: for the signs themselves"
    )


# -------------------------------------------------------------------------------------------------------------------- chunks


class PromptEncoder:
    """Conditions of prompts by an encoder of CLIP's tokens, with emphasis, with chunks, or with both.

    encoder: has `max_length` (tokens of a chunk, begin and end included), `pad_id` (after the end token; None repeats it) and
    `encode_tokens`, (B, max_length) int64 -> (B, max_length, D).
    """

    def __init__(
        self, encoder: Any, emphasis: bool = False, long_prompts: bool = False, tokenizer: CLIPTokenizer | None = None
    ) -> None:
        if not callable(getattr(encoder, "encode_tokens", None)):
            raise ValueError(
                f"--emphasis and --long_prompts need a text encoder over CLIP's tokens; {type(encoder).__name__} is none"
            )
        from ldm.modules.encoders.tokenizers import clip_tokenizer

        self.encoder, self.emphasis, self.long_prompts = encoder, emphasis, long_prompts
        self.tokenizer = tokenizer if tokenizer is not None else clip_tokenizer()
        self.room = encoder.max_length - 2

    def chunks_for(self, prompts: Iterable[str]) -> int:
        """How many chunks the longest of the prompts needs, at least 1."""
        if not self.long_prompts:
            return 1
        return max(1, *(-(-len(self.tokens(prompt)) // self.room) for prompt in prompts))

    def __call__(self, prompts: Sequence[str], chunks: int = 1) -> Tensor:
        """B prompts -> (B, chunks * max_length, D); ValueError where one needs more chunks."""
        import torch

        rows = [self._in_chunks(prompt, chunks) for prompt in prompts]
        encoded = [self._encode([row[k] for row in rows]) for k in range(chunks)]
        return torch.cat(encoded, dim=1)

    def tokens(self, prompt: str) -> list[Token]:
        """The prompt's tokens, without begin and end, each with its weight."""
        parts = parse_emphasis(prompt) if self.emphasis else [Part(prompt, 1.0)]
        return [Token(i, part.weight) for part in parts for i in self.tokenizer.encode(part.text)]

    def _in_chunks(self, prompt: str, chunks: int) -> list[list[Token]]:
        tokens = self.tokens(prompt)
        if len(tokens) > chunks * self.room:
            if self.long_prompts:
                raise ValueError(f"a prompt of {len(tokens)} tokens needs more than {chunks} chunks of {self.room}")
            dropped = [token.id for token in tokens[self.room :]]
            self.tokenizer.warn_truncated(prompt, self.room, partial(self.tokenizer.decode, dropped))
        return [tokens[k * self.room : (k + 1) * self.room] for k in range(chunks)]

    def _encode(self, rows: list[list[Token]]) -> Tensor:
        """One chunk of each prompt -> (B, max_length, D)."""
        import torch

        first, last, pad = self.tokenizer.begin_id, self.tokenizer.end_id, self.encoder.pad_id
        ids = torch.full((len(rows), self.encoder.max_length), last if pad is None else pad, dtype=torch.int64)
        weights = torch.ones(ids.shape)
        for i, row in enumerate(rows):
            ids[i, : len(row) + 2] = torch.tensor([first, *(token.id for token in row), last])
            weights[i, 1 : len(row) + 1] = torch.tensor([token.weight for token in row])
        z = self.encoder.encode_tokens(ids)
        return z if bool((weights == 1.0).all()) else weighted(z, weights.to(z.device))


def weighted(z: Tensor, weights: Tensor) -> Tensor:
    """Embeddings z (B, L, D) times weights (B, L), each row with the mean that it had.

    A mean that is 0 within rounding, or that changes its sign, cannot be restored: such rows are only multiplied.
    """
    import torch

    numbers = z.float()
    heavy = numbers * weights[..., None]
    mean, new = (x.flatten(1).mean(dim=1) for x in (numbers, heavy))
    least = _WITHOUT_WEIGHT * numbers.flatten(1).std(dim=1)
    usable = (mean * new > 0) & (mean.abs() > least) & (new.abs() > least)
    ratio = torch.where(usable, mean / torch.where(usable, new, 1.0), 1.0)
    ratio = torch.where(
        (weights == 1.0).all(dim=1), 1.0, ratio
    )  # a row without emphasis keeps its values to the last bit
    return (heavy * ratio[:, None, None]).to(z.dtype)
