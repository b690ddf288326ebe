"""The one "did you mean": the choice that is closest to a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, choices: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the choice most similar to `name`, or None if none reaches the similarity `cutoff` in [0, 1]."""
    near = difflib.get_close_matches(name, sorted(map(str, choices)), n=1, cutoff=cutoff)
    return near[0] if near else None


def did_you_mean(name: str, choices: Iterable[str], cutoff: float = 0.5) -> str:
    """Return the end of an error message: "; did you mean 'x'?", else "; choices: ...", else an empty string."""
    choices = sorted(map(str, choices))
    near = closest(name, choices, cutoff)
    if near is not None:
        return f"; did you mean {near!r}?"
    return f"; choices: {', '.join(choices)}" if choices else ""
