"""Find files of the checkout from any working directory; fingerprints of files, lines of text files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the checkout, which holds configs/ and models/
SD_CKPT = "models/ldm/stable-diffusion-v1/model.ckpt"  # the published place
SD_SOURCE = "put sd-v1-4.ckpt of https://huggingface.co/CompVis/stable-diffusion-v-1-4-original there"


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Return `path` with the home directory in place of `~`; the `~` of an unknown user is part of a name."""
    return Path(os.path.expanduser(path))


def find_file(path: str | Path) -> Path:
    """Return `path`, or the same path in the checkout if it is relative and exists only there."""
    path = expand_user(path)
    return ROOT / path if not path.is_absolute() and not path.exists() and (ROOT / path).exists() else path


def in_checkout(path: str | Path) -> str:
    """Return `path` as shown in messages and metadata: relative to the checkout if inside it."""
    path = Path(path)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def shown_path(path: Path) -> Path:
    """Return `path` as shown in the log of a run: relative to the working directory if inside it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def lines_of(text: str) -> list[str]:
    """Return the lines of a text; `str.splitlines` would also split at U+2028, U+0085 and form feeds."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def files_in(folder: Path) -> list[Path]:
    """Return the configs and weights at any depth of a model's folder, sorted."""
    endings = (".json", ".safetensors", ".bin")
    return sorted(path for path in folder.rglob("*") if path.suffix in endings and path.is_file())


def fingerprint(path: str | os.PathLike, files: Sequence[Path] | None = None) -> str:
    """Return 16 hex digits of the SHA-256 of 64 pieces spread over a file (all of a small file).

    It takes under a second for 4 GB. For a folder it covers each of `files` (default: `files_in(path)`) and its name.
    """
    path = Path(path)
    root, piece, pieces, digest = path if path.is_dir() else path.parent, 16384, 64, hashlib.sha256()
    for file in files or (files_in(path) if path.is_dir() else [path]):
        if file != path:
            digest.update(file.relative_to(root).as_posix().encode())
        size = file.stat().st_size
        with file.open("rb") as opened:
            for k in range(pieces):
                opened.seek(k * max(0, size - piece) // (pieces - 1))
                digest.update(opened.read(piece))
    return digest.hexdigest()[:16]
