"""Textual inversion files in sampling: their tokens, which prompts and negative prompts may use."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.checkpoint.diffusers.embeddings import read_embeddings
from ldm.modules.encoders.base import CLIPTokensEncoder
from ldm.modules.encoders.tokenizers import clip_tokenizer

logger = logging.getLogger(__name__)


class AddedToken(NamedTuple):
    """A token of a file, with the names that prompts may call it by and its vectors (N, D)."""

    path: Path
    names: list[str]
    vectors: Tensor


def read_tokens(files: Sequence[tuple[str | Path, str | None]]) -> list[AddedToken]:
    """Read the tokens of (file, name). Raises ValueError or CheckpointError, with the file.

    Prompts call a token by `name`. Without one, they call it by its name in the file and by <STEM> of the file's name;
    by STEM too, unless the name in the file has brackets. Several tokens of a file have their names in the file alone.
    """
    tokens = []
    for file, name in files:
        path = Path(file)
        found = read_embeddings(path)
        if name is not None and len(found) > 1:
            every = ", ".join(str(embedding.token) for embedding in found)
            raise ValueError(f"--embedding {path}:{name}: the file has {len(found)} tokens, {every}; remove :{name}")
        for embedding in found:
            own = [] if embedding.token is None else [embedding.token]
            bare = [] if own and own[0].startswith("<") else [path.stem]
            names = own if len(found) > 1 else [*own, *bare, f"<{path.stem}>"]
            tokens.append(AddedToken(path, [name] if name else names, embedding.vectors))
    return tokens


@torch.no_grad()
def add_tokens(encoder: Any, tokens: Sequence[AddedToken]) -> None:
    """Add tokens to a text encoder; raise ValueError, with the file, for one that does not fit."""
    for path, names, vectors in tokens:
        if not isinstance(encoder, CLIPTokensEncoder):
            raise ValueError(
                f"--embedding {path}: requires a text encoder of CLIP's tokens, not {type(encoder).__name__}"
            )
        try:
            encoder.add_token(names, vectors)
        except ValueError as error:
            raise ValueError(f"--embedding {path}: {error}") from error
        count = f"{len(vectors)} vector" + ("s" if len(vectors) > 1 else "")
        logger.info("%s: %s, in prompts %s", path, count, " or ".join(dict.fromkeys(names)))


def warn_unused(encoder: CLIPTokensEncoder, texts: Sequence[str]) -> None:
    """Log a warning for each added token that no text contains: another spelling of it is ordinary words."""
    added = encoder.token_embeddings.ids
    used = {token for text in texts for token in clip_tokenizer().encode(text, added)}
    names: dict[range, list[str]] = {}
    for name, ids in added.items():
        names.setdefault(ids, []).append(name)
    for ids, spellings in names.items():
        if used.isdisjoint(ids):
            logger.warning("no prompt contains %s, the token of an embedding", " or ".join(spellings))
