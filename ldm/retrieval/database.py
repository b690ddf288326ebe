"""Databases of CLIP vectors, in which retrieval-augmented diffusion looks up neighbors (Blattmann et al. 2022, arXiv 2204.11824).

A database is a folder of `*.npz` parts, read in the order of their names, laid out as published:
    embedding     (N, D) float16 or float32: CLIP's vectors of pictures or of patches of them
    img_id        (N,) numbers or strings: which picture each is of; optional
    patch_coords  (N, 4): where in that picture; optional. `embed_folder` writes left, top, right, bottom as shares of the picture.
Parts that are not compressed (np.savez) stay on disk and are mapped.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ldm.paths import find_file

STYLES = ("art_nouveau", "baroque", "expressionism", "impressionism", "post_impressionism")
STYLES += ("realism", "renaissance", "romanticism", "surrealism", "ukiyo_e")
DATABASES = ("openimages", *(f"artbench-{style}" for style in STYLES))  # the published ones


def searcher_folder(database: str) -> Path:
    """Where the searcher of a database lies unless another place is given."""
    return find_file(Path("data/rdm/searchers") / Path(database).name)


def find_database(name: str) -> Path:
    """The folder of a published database or, for a name that is none of them, the folder itself; FileNotFoundError where there is none."""
    folder = find_file(Path("data/rdm/retrieval_databases") / name if name in DATABASES else name)
    if folder.is_dir():
        return folder
    if name in DATABASES:
        url = "https://ommer-lab.com/files/rdm/artbench_databases.zip"
        raise FileNotFoundError(
            f"--database {name}: {folder} is no folder" + (f"; unpack {url} there" if name != "openimages" else "")
        )
    raise FileNotFoundError(
        f"--database {name}: no such folder; give one with .npz parts, or one of {', '.join(DATABASES)}"
    )


class Database:
    """The vectors of a folder of parts, numbered through all parts from 0. ValueError where a part does not have the layout."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = sorted(self.folder.glob("*.npz"))
        if not self.files:
            raise ValueError(f"{folder}: no .npz parts; a database has them with an array `embedding` (N, D)")
        self.parts = [read_array(file, "embedding") for file in self.files]
        self.dim = int(self.parts[0].shape[-1])
        for file, part in zip(self.files, self.parts, strict=True):
            if part.ndim != 2 or not part.size or part.dtype.kind != "f" or part.shape[1] != self.dim:
                expected = f"expected (N, {self.dim}) numbers, N at least 1"
                raise ValueError(f"{file}: embedding has shape {part.shape} and type {part.dtype}; {expected}")
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def identity(self) -> list[list[Any]]:
        """[name, vectors, bytes] of every part: what an index belongs to."""
        return [[file.name, len(part), file.stat().st_size] for file, part in zip(self.files, self.parts, strict=True)]

    def embedding(self, ids: np.ndarray) -> np.ndarray:
        """Vectors (..., D) float32, as they are stored, of ids (...)."""
        out = np.empty((ids.size, self.dim), dtype=np.float32)
        part_of = np.searchsorted(self.starts, ids.ravel(), side="right") - 1
        for part in np.unique(part_of):
            rows = part_of == part
            out[rows] = self.parts[part][ids.ravel()[rows] - self.starts[part]]
        return out.reshape(*ids.shape, self.dim)

    def img_id(self, ids: np.ndarray) -> list[Any]:
        """Which pictures these vectors are of; their own numbers where the parts do not say."""
        found = []
        for number in ids.ravel().tolist():
            part = int(np.searchsorted(self.starts, number, side="right")) - 1
            try:
                found.append(read_array(self.files[part], "img_id")[number - self.starts[part]].item())
            except ValueError:
                found.append(number)
        return found

    def units(self, size: int = 65536) -> Iterator[np.ndarray]:
        """All vectors in order, float32 (n, D) of length 1, at most `size` at a time; ValueError where one is not finite."""
        for file, part in zip(self.files, self.parts, strict=True):
            for start in range(0, len(part), size):
                block = unit(part[start : start + size])
                if not np.isfinite(block).all():
                    raise ValueError(f"{file}: embedding has values that are not finite")
                yield block


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors (n, D) as float32 of length 1, so that inner products are cosines; zeros stay zeros."""
    x = np.asarray(x, dtype=np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def read_array(file: Path, name: str) -> np.ndarray:
    """One array of an .npz, mapped where it is not compressed; ValueError where it is not there or would run code when read."""
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
        return (
            np.memmap(file, dtype, "r", position, shape, "F" if fortran_order else "C")
            if np.prod(shape)
            else np.empty(shape, dtype)
        )
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        what = f"no array {name!r}" if isinstance(error, KeyError) else f"{name}: {error}"
        layout = "a part of a database is an .npz with embedding (N, D), img_id (N,) and patch_coords (N, 4)"
        raise ValueError(f"{file}: {what}; {layout}") from error


def embed_folder(pictures: str | Path, folder: str | Path, clip: Any, batch_size: int = 32) -> Path:
    """Make a database of the pictures in a folder and below, one vector of each -> the part that was written.

    clip: embeds pictures (B, 3, H, W) in [-1, 1] as (B, D). It sees the largest square in the middle, which is what `patch_coords` holds;
    `img_id` is the path within the folder. ValueError where there are no pictures, or a database is there already.
    """
    import torch
    from tqdm import tqdm

    from ldm.data.image import crop_box, load_image, resampling, to_array
    from ldm.data.listing import scan

    root, part = Path(pictures), Path(folder) / "part-000.npz"
    names = scan(root)
    if not names:
        raise ValueError(f"--images {root}: no pictures in it or below; give a folder that has some")
    if any(part.parent.glob("*.npz")):
        raise ValueError(f"--database {part.parent}: a database is there already; give a new folder")
    vectors, places = [], []
    with tqdm(total=len(names), desc="embedding", unit="picture") as bar, torch.no_grad():
        for start in range(0, len(names), batch_size):
            squares = []
            for name in names[start : start + batch_size]:
                image = load_image(root / name)
                box = crop_box(image.size, min(image.size))
                square = image.resize((clip.size, clip.size), resampling("bicubic"), box)
                squares.append(torch.from_numpy(to_array(square)).permute(2, 0, 1))
                places.append(np.divide(box, (*image.size, *image.size)))
            vectors.append(clip(torch.stack(squares).to(clip.device)).float().cpu().numpy())
            bar.update(len(squares))
    part.parent.mkdir(parents=True, exist_ok=True)
    new = part.with_name(f".{part.name}.{os.getpid()}")
    with new.open("wb") as file:
        np.savez(
            file,
            embedding=np.concatenate(vectors),
            img_id=np.array(names),
            patch_coords=np.array(places, dtype=np.float32),
        )
    return new.replace(part)
