"""JSON files of strangers: an object, or one clear line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def load_object(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file; ValueError, naming the file, where it holds something else, OSError where it cannot be read."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, where an object was expected")
    return content
