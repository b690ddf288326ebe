"""Databases of CLIP vectors for retrieval-augmented diffusion (Blattmann et al. 2022, arXiv 2204.11824).

A database is a folder of `*.npz` parts, read in the order of their names, with the published layout:
    embedding     (N, D) float16 or float32: CLIP vectors of images or of patches
    img_id        (N,) numbers or strings: the image of each vector; optional
    patch_coords  (N, 4): the patch in the image; optional. `embed_folder` writes left, top, right, bottom in [0, 1].
Uncompressed parts (np.savez) are memory-mapped.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ldm.paths import find_file

_STYLES = "art_nouveau baroque expressionism impressionism post_impressionism"
_STYLES += " realism renaissance romanticism surrealism ukiyo_e"
DATABASES = ("openimages", *(f"artbench-{style}" for style in _STYLES.split()))  # the published ones


def searcher_folder(database: str) -> Path:
    """Default folder of a database's searcher."""
    return find_file(Path("data/rdm/searchers") / Path(database).name)


def find_database(name: str) -> Path:
    """The folder of a published database, or the named folder itself; raise FileNotFoundError if it is missing."""
    folder = find_file(Path("data/rdm/retrieval_databases") / name if name in DATABASES else name)
    if folder.is_dir():
        return folder
    if name in DATABASES:
        url = "https://ommer-lab.com/files/rdm/artbench_databases.zip"
        hint = "" if name == "openimages" else f"; unpack {url} there"
        raise FileNotFoundError(f"--database {name}: no folder {folder}{hint}")
    raise FileNotFoundError(
        f"--database {name}: no such folder; pass one with .npz parts, or one of {', '.join(DATABASES)}"
    )


class Database:
    """The vectors of a folder of parts, numbered from 0 over all parts; raises ValueError for another layout."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = sorted(self.folder.glob("*.npz"))
        if not self.files:
            raise ValueError(f"{folder}: no .npz parts with an array `embedding` (N, D)")
        self.parts = [read_array(file, "embedding") for file in self.files]
        self.dim = int(self.parts[0].shape[-1])
        for file, part in zip(self.files, self.parts, strict=True):
            if part.ndim != 2 or not part.size or part.dtype.kind != "f" or part.shape[1] != self.dim:
                raise ValueError(
                    f"{file}: embedding has shape {part.shape} and dtype {part.dtype}; "
                    f"expected (N, {self.dim}) floats, N >= 1"
                )
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def identity(self) -> list[list[Any]]:
        """[name, vectors, bytes] of every part, to recognize the database of an index."""
        return [[file.name, len(part), file.stat().st_size] for file, part in zip(self.files, self.parts, strict=True)]

    def embedding(self, ids: np.ndarray) -> np.ndarray:
        """Vectors (..., D) float32, as stored, of ids (...)."""
        out = np.empty((ids.size, self.dim), dtype=np.float32)
        part_of = np.searchsorted(self.starts, ids.ravel(), side="right") - 1
        for part in np.unique(part_of):
            rows = part_of == part
            out[rows] = self.parts[part][ids.ravel()[rows] - self.starts[part]]
        return out.reshape(*ids.shape, self.dim)

    def img_id(self, ids: np.ndarray) -> list[Any]:
        """The images of these vectors; the ids themselves if the parts have no `img_id`."""
        found = []
        for number in ids.ravel().tolist():
            part = int(np.searchsorted(self.starts, number, side="right")) - 1
            try:
                found.append(read_array(self.files[part], "img_id")[number - self.starts[part]].item())
            except ValueError:
                found.append(number)
        return found

    def units(self, size: int = 65536) -> Iterator[np.ndarray]:
        """All vectors in order, float32 (n, D) of length 1, `size` at a time; raise ValueError if one is not finite."""
        for file, part in zip(self.files, self.parts, strict=True):
            for start in range(0, len(part), size):
                block = unit(part[start : start + size])
                if not np.isfinite(block).all():
                    raise ValueError(f"{file}: embedding has non-finite values")
                yield block


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors (n, D) as float32 of length 1, so that inner products are cosines; zeros stay zeros."""
    x = np.asarray(x, dtype=np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def read_array(file: Path, name: str) -> np.ndarray:
    """One array of an .npz, memory-mapped if uncompressed; raise ValueError if it is missing or holds objects."""
    try:
        with zipfile.ZipFile(file) as archive:
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type != zipfile.ZIP_STORED:
                with np.load(file, allow_pickle=False) as arrays:
                    return arrays[name]
            with archive.open(info) as member:
                headers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
                shape, fortran_order, dtype = headers[np.lib.format.read_magic(member)[0]](member)
                position = member.tell()
        if dtype.hasobject:
            raise ValueError("holds Python objects")
        with file.open("rb") as raw:  # the local header: 30 bytes, the name, an extra field
            raw.seek(info.header_offset + 26)
            position += info.header_offset + 30 + sum(struct.unpack("<HH", raw.read(4)))
        if not np.prod(shape):
            return np.empty(shape, dtype)
        return np.memmap(file, dtype, "r", position, shape, "F" if fortran_order else "C")
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        what = f"no array {name!r}" if isinstance(error, KeyError) else f"{name}: {error}"
        layout = "a part of a database is an .npz with embedding (N, D), img_id (N,) and patch_coords (N, 4)"
        raise ValueError(f"{file}: {what}; {layout}") from error
