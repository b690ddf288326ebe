"""Paths that work from any folder: files of the checkout are found from wherever a command is run."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the checkout, which holds configs/ and models/


def find_file(path: str | Path) -> Path:
    """`path` as it stands, or inside the checkout where it is relative and only there; it need not exist."""
    path = Path(path).expanduser()
    return ROOT / path if not path.is_absolute() and not path.exists() and (ROOT / path).exists() else path


def in_checkout(path: str | Path) -> str:
    """`path` for people and metadata: without the folders above the checkout where it lies inside."""
    path = Path(path)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
