r"""Emphasis in prompts, `(word:1.3)`, read into weighted parts. Imports no torch.

Not part of the published models. The syntax is that of AUTOMATIC1111's web UI
(https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features, "Attention/emphasis"):

    (text)      1.1 times                   [text]      1 / 1.1 times
    (text:1.3)  1.3 times, 0 to 10          ((text))    brackets multiply: 1.21 times
    \( \) \[ \] \: \\  the character itself
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

ROUND, SQUARE = 1.1, 1 / 1.1
MAX_WEIGHT = 10.0
_SPECIAL = re.compile(r"\\[()\[\]:\\]|[()\[\]:]")  # a bracket or a colon, or its escape
_WEIGHT = re.compile(r":\s*(|[-+.\d][^()\[\]]*)\)")  # what can only be meant as a weight


class Part(NamedTuple):
    """A piece of a prompt and its weight."""

    text: str
    weight: float


def parse_emphasis(prompt: str) -> list[Part]:
    """Split a prompt into weighted parts; raise ValueError for unbalanced brackets and invalid weights."""
    parts: list[Part] = []
    opened: list[tuple[str, int, int]] = []  # bracket, its position, number of parts before it
    text, position = "", 0

    def end_part() -> None:
        nonlocal text
        if text:
            parts.append(Part(text, 1.0))
        text = ""

    def close(weight: float) -> None:
        _, _, first = opened.pop()
        parts[first:] = [Part(part.text, part.weight * weight) for part in parts[first:]]

    for match in _SPECIAL.finditer(prompt):
        if match.start() < position:  # inside a weight that was read
            continue
        text, position, sign = text + prompt[position : match.start()], match.end(), match[0]
        if sign[0] == "\\":
            text += sign[1]
        elif sign in "([":
            end_part()
            opened.append((sign, match.start(), len(parts)))
        elif sign in ")]":
            if not opened or opened[-1][0] != {")": "(", "]": "["}[sign]:
                raise _error(prompt, f"{sign} at character {match.start() + 1} closes no bracket")
            end_part()
            close(ROUND if sign == ")" else SQUARE)
        elif opened and opened[-1][0] == "(" and (ending := _WEIGHT.match(prompt, match.start())):
            end_part()
            position = ending.end()
            close(_weight(ending[1], prompt))
        else:
            text += sign
    if opened:
        raise _error(prompt, f"{opened[0][0]} at character {opened[0][1] + 1} is never closed")
    text += prompt[position:]
    end_part()
    return parts


def _weight(text: str, prompt: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0.0 <= weight <= MAX_WEIGHT:
        raise _error(prompt, f"{':' + text!r} is not a weight from 0 to {MAX_WEIGHT:g}")
    return weight


def _error(prompt: str, what: str) -> ValueError:
    return ValueError(
        f"--emphasis: {what} in {prompt!r}; write (words:1.3), and \\( \\) \\[ \\] \\: for literal characters"
    )
