"""The one way out of every sampling script: watermark, settings in the PNG's metadata, a file that replaces no other."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

logger = logging.getLogger(__name__)

METADATA_KEY = "ldm"  # keyword of the PNG's text chunk; its text is one JSON object
WATERMARK = b"StableDiffusionV1"  # 17 bytes = 136 bits
WATERMARK_MIN_PIXELS = 256 * 256  # the package refuses less


class Picture(NamedTuple):
    """A finished picture and all that it was made with, ready for JSON."""

    image: Image.Image
    info: dict[str, Any]


class Watermark:
    """The published invisible mark, `content` in the wavelet coefficients of the blue chroma (method dwtDct of invisible-watermark).

    It is a hint, not a proof: of photographs only a part of the bits can be read back, and JPEG may erase all of them.
    """

    method = "dwtDct"

    def __init__(self, content: bytes = WATERMARK) -> None:
        self.content = content
        self._told: set[str] = set()

    def __str__(self) -> str:
        return f"{self.content.decode()}, {self.method}, {8 * len(self.content)} bits"

    def __call__(self, image: Image.Image) -> tuple[Image.Image, bool]:
        """(picture, whether it is marked): unmarked, with one notice, where it is too small or the package is missing."""
        if image.width * image.height < WATERMARK_MIN_PIXELS:
            return image, self._skip("no watermark on pictures under 256x256 pixels")
        try:
            return self._mark(image), True
        except ImportError as error:
            return image, self._skip(f"no watermark ({error}): pip install invisible-watermark brings it")

    def _mark(self, image: Image.Image) -> Image.Image:
        import numpy as np
        from imwatermark import WatermarkEncoder

        encoder = WatermarkEncoder()
        encoder.set_watermark("bytes", self.content)
        bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
        return Image.fromarray(np.ascontiguousarray(encoder.encode(bgr, self.method)[:, :, ::-1]))

    def _skip(self, notice: str) -> bool:
        if notice not in self._told:
            self._told.add(notice)
            logger.info(notice)
        return False


class PictureFolder:
    """Numbered PNG files in one folder: the number after the highest one there, so that no file is ever overwritten.

    pattern: the file name with one number in it, "{:05}.png" or "grid-{:04}.png".
    """

    def __init__(self, folder: str | Path, pattern: str = "{:05}.png") -> None:
        self.folder, self.pattern = Path(folder), pattern
        before, after = re.split(r"\{[^}]*\}", pattern)
        self._name = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise ValueError(f"{self.folder} is a file; give a folder for the pictures") from error
        taken = [int(match[1]) for path in self.folder.iterdir() if (match := self._name.fullmatch(path.name))]
        self._next = max(taken, default=-1) + 1

    def save(self, picture: Picture) -> Path:
        """Write one picture with its settings in the metadata -> its path."""
        data = io.BytesIO()
        picture.image.save(data, "PNG", pnginfo=png_info(picture.info))
        while True:
            path = self.folder / self.pattern.format(self._next)
            self._next += 1
            try:
                with path.open("xb") as file:                               # fails where another run took the number meanwhile
                    file.write(data.getbuffer())
                return path
            except FileExistsError:
                continue


def png_info(info: Mapping[str, Any]) -> PngInfo:
    """The PNG's text chunk that holds `info` as ASCII JSON."""
    chunk = PngInfo()
    chunk.add_text(METADATA_KEY, json.dumps(info))
    return chunk


def read_info(path: str | Path) -> dict[str, Any]:
    """The settings that a picture of this project was drawn with; ValueError where the file holds none."""
    with Image.open(path) as image:
        text = getattr(image, "text", {}).get(METADATA_KEY)
    if text is None:
        raise ValueError(f"{path}: no settings in this file's metadata; only PNG files as written by this project's scripts hold them")
    return json.loads(text)


class Output:
    """Where every script's pictures leave the program: marked, described, written."""

    def __init__(self, folder: str | Path, watermark: Watermark | None = None) -> None:
        self.watermark = watermark
        self.samples = PictureFolder(Path(folder) / "samples")
        self.grids = PictureFolder(folder, "grid-{:04}.png")

    def save_sample(self, picture: Picture) -> Path:
        return self._save(picture, self.samples)

    def save_grid(self, picture: Picture) -> Path:
        return self._save(picture, self.grids)

    def _save(self, picture: Picture, folder: PictureFolder) -> Path:
        image, marked = self.watermark(picture.image) if self.watermark is not None else (picture.image, False)
        return folder.save(Picture(image, {**picture.info, "watermark": str(self.watermark) if marked else None}))
