"""The one way out of every script that draws: safety check, watermark, settings in the PNG's metadata, a file that replaces no other."""

from __future__ import annotations

import io
import itertools
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.output.watermark import Watermark

METADATA_KEY = "ldm"  # keyword of the PNG's text chunk; its text is one JSON object


class GeneratedImage(NamedTuple):
    """A finished picture and all that it was made with, ready for JSON."""

    image: Image.Image
    info: dict[str, Any]
    drawn: Image.Image | None = (
        None  # mode 1: where the pixels were drawn; the others are a person's own and are never marked
    )
    checked: bool = False  # its metadata tells what the safety checker said of it, or that it was not asked


Check = Callable[[GeneratedImage], GeneratedImage]
"""A drawn picture -> a checked one (ldm.output.safety)."""


class NumberedFiles:
    """Numbered PNG files in one folder: the number after the highest one there, so that no file is ever overwritten.

    pattern: the file name with one number in it, "{:05}.png" or "grid-{:04}.png".
    """

    def __init__(self, folder: str | Path, pattern: str = "{:05}.png") -> None:
        self.folder, self.pattern = Path(folder), pattern
        before, after = re.split(r"\{[^}]*\}", pattern)
        self._name = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
        make_folder(self.folder)
        taken = [int(match[1]) for path in self.folder.iterdir() if (match := self._name.fullmatch(path.name))]
        self._next = max(taken, default=-1) + 1

    def save(self, picture: GeneratedImage) -> Path:
        """Write one picture with its settings in the metadata -> its path."""
        return write_new(self._names(), picture)

    def _names(self) -> Iterator[Path]:
        while True:
            self._next += 1
            yield self.folder / self.pattern.format(self._next - 1)


def make_folder(folder: Path) -> None:
    """The folder, with those above it; ValueError where a file has its name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} is a file or lies in one; give a folder for the pictures") from error


def write_new(names: Iterator[Path], picture: GeneratedImage) -> Path:
    """Write one picture with its settings in the metadata under the first of the names that is free -> that name."""
    data = io.BytesIO()
    picture.image.save(data, "PNG", pnginfo=png_info(picture.info))
    for path in names:
        try:
            with path.open("xb") as file:  # fails where the name is taken, by another run meanwhile too
                file.write(data.getbuffer())
            return path
        except FileExistsError:
            continue
    raise AssertionError("names go on for ever")


def png_info(info: Mapping[str, Any]) -> PngInfo:
    """The PNG's text chunk that holds `info` as ASCII JSON."""
    chunk = PngInfo()
    chunk.add_text(METADATA_KEY, json.dumps(info))
    return chunk


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The settings that a picture of this project was drawn with; ValueError where the file holds none."""
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(METADATA_KEY)
    except (
        Image.DecompressionBombError,
        SyntaxError,
        ValueError,
    ) as error:  # PIL's errors for files that lie about themselves
        raise ValueError(f"{path}: no picture whose metadata can be read ({error})") from error
    if text is None:
        raise ValueError(
            f"{path}: no settings in this file's metadata; only PNG files as written by this project's scripts hold them"
        )
    try:
        info = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata is damaged ({error})") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path}: its metadata is damaged (no settings but a {type(info).__name__})")
    return info


class Output:
    """Where every script's pictures leave the program: checked, marked, described, written.

    safety: None: nothing is checked, and the metadata say so. samples: names of the numbered samples, as seen from the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        watermark: Watermark | None = None,
        safety: Check | None = None,
        samples: str = "samples/{:05}.png",
    ) -> None:
        self.folder, self.watermark, self.safety = Path(folder), watermark, safety
        names = self.folder / samples
        self.samples = NumberedFiles(names.parent, names.name)
        self.grids = NumberedFiles(folder, "grid-{:04}.png")

    def checked(self, picture: GeneratedImage) -> GeneratedImage:
        """The picture as it may be shown, for grids and arrays that are made of it; saving does the same to what is not checked yet."""
        return checked(picture, self.safety)

    def save_sample(self, picture: GeneratedImage) -> Path:
        return self.samples.save(marked(self.checked(picture), self.watermark))

    def save_grid(self, picture: GeneratedImage) -> Path:
        return self.grids.save(marked(self.checked(picture), self.watermark))


class NamedOutput:
    """The way out of scripts that change pictures: each result has the name of its original, `x.png`, or `x-1.png` where that is taken."""

    def __init__(self, folder: str | Path, watermark: Watermark | None = None, safety: Check | None = None) -> None:
        self.folder, self.watermark, self.safety = Path(folder), watermark, safety
        make_folder(self.folder)

    def save(self, picture: GeneratedImage, stem: str) -> Path:
        if Path(stem).name != stem:
            raise ValueError(f"{stem!r}: expected the name of a picture without folders")
        names = itertools.chain([f"{stem}.png"], (f"{stem}-{k}.png" for k in itertools.count(1)))
        return write_new((self.folder / name for name in names), marked(checked(picture, self.safety), self.watermark))


def checked(picture: GeneratedImage, safety: Check | None) -> GeneratedImage:
    """The picture after the safety check, once; without one, with a word about that in its metadata."""
    if picture.checked:
        return picture
    if safety is None:
        return picture._replace(info={**picture.info, "safety": "off", "flagged": None}, checked=True)
    return safety(picture)


def marked(picture: GeneratedImage, watermark: Watermark | None) -> GeneratedImage:
    """The picture with the mark in it where it can hold one and anything is drawn, and with a word about it in its metadata."""
    drawn = picture.drawn is None or picture.drawn.getbbox() is not None
    image, done = watermark(picture.image) if watermark is not None and drawn else (picture.image, False)
    text = str(watermark) if done else None
    if done and picture.drawn is not None:
        image, text = Image.composite(image, picture.image, picture.drawn), f"{text}, in the drawn pixels alone"
    return picture._replace(image=image, info={**picture.info, "watermark": text})


class SampleArray:
    """All samples of a run in one file, `numpy/<shape>-samples.npz`: arr_0 uint8 (N, H, W, 3) and, with classes, arr_1 int64 (N,).

    They go to the disk as they come, so that memory holds one; the file appears when all N are there.
    """

    def __init__(self, folder: str | Path, count: int) -> None:
        self.folder, self.count, self.classes = Path(folder), count, []
        self._part, self._array, self._filled = self.folder / ".samples.npy.part", None, 0
        make_folder(self.folder)

    def append(self, image: Image.Image, label: int | None = None) -> None:
        import numpy as np

        pixels = np.asarray(image)
        if self._array is None:
            self._array = np.lib.format.open_memmap(self._part, "w+", np.uint8, (self.count, *pixels.shape))
        self._array[self._filled] = pixels
        self._filled += 1
        if label is not None:
            self.classes.append(label)

    def finish(self) -> Path:
        """Write the file -> its path; ValueError unless exactly N samples have come."""
        import numpy as np

        if self._array is None or self._filled != self.count:
            raise ValueError(f"{self._filled} samples of {self.count} have come")
        path = self.folder / f"{'x'.join(map(str, self._array.shape))}-samples.npz"
        self._array.flush()
        self._array = None
        with zipfile.ZipFile(
            path, "x", zipfile.ZIP_STORED
        ) as archive:  # what np.savez writes, without the array in memory
            archive.write(self._part, "arr_0.npy")
            if self.classes:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(self.classes, dtype=np.int64))
        return path

    def close(self) -> None:
        """Take away what an unfinished or finished run leaves beside the file."""
        self._array = None
        self._part.unlink(missing_ok=True)
