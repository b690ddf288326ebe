"""The one "did you mean": the choice that is closest to a misspelt name. And the one log line of an unused name."""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Iterable

logger = logging.getLogger(__name__)


def closest(name: str, choices: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the choice most similar to `name`, or None if none reaches the similarity `cutoff` in [0, 1]."""
    choices = sorted(map(str, choices))
    near = [choice for choice in choices if choice.casefold() == name.casefold()]
    near = near or difflib.get_close_matches(name, choices, n=1, cutoff=cutoff)
    return near[0] if near else None


def did_you_mean(name: str, choices: Iterable[str], cutoff: float = 0.5) -> str:
    """Return the end of an error message: "; did you mean 'x'?", else "; choices: ...", else an empty string."""
    choices = sorted(map(str, choices))
    near = closest(name, choices, cutoff)
    if near is not None:
        return f"; did you mean {near!r}?"
    return f"; choices: {', '.join(choices)}" if choices else ""


def log_unused(place: str, names: Iterable[str], known: Iterable[str] = ()) -> None:
    """Log once per process that `names` have no effect at `place`: published code may pass more than is used here."""
    known = tuple(known)
    for name in sorted(map(str, names)):
        _log_unused(place, name, did_you_mean(name, known) if closest(name, known) else "")


@functools.cache
def _log_unused(place: str, name: str, advice: str) -> None:
    logger.warning("%s: %s has no effect%s", place, name, advice)
