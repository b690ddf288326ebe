"""Output of every script: safety check, watermark, metadata in the PNG, and file names that are never used twice."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.atomic import save_bytes, temporary_next_to
from ldm.output.watermark import Watermark

METADATA_KEY = "ldm"  # keyword of the PNG's text chunk, which holds one JSON object


class GeneratedImage(NamedTuple):
    """A generated image and its metadata, which are ready for JSON."""

    image: Image.Image
    info: dict[str, Any]
    generated: Image.Image | None = (
        None  # mode 1, for inpainting: the pixels that were generated; others get no watermark
    )
    checked: bool = False  # the metadata hold the result of the safety check, or that it was off


Check = Callable[[GeneratedImage], GeneratedImage]
"""The safety check of an image (ldm.output.safety)."""


class NumberedFiles:
    """Numbered PNG files in one folder, after the highest number in it, so that no file is ever overwritten.

    pattern: a file name with one number, "{:05}.png" or "grid-{:04}.png".
    """

    def __init__(self, folder: str | Path, pattern: str = "{:05}.png") -> None:
        self.folder, self.pattern = Path(folder), pattern
        before, after = re.split(r"\{[^}]*\}", pattern)
        name = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
        make_folder(self.folder)
        used = [int(match[1]) for path in self.folder.iterdir() if (match := name.fullmatch(path.name))]
        self._numbers = itertools.count(max(used, default=-1) + 1)

    def save(self, image: GeneratedImage) -> Path:
        return write_new((self.folder / self.pattern.format(number) for number in self._numbers), image)


def make_folder(folder: Path) -> None:
    """Create a folder and check that files can be written into it; raise ValueError if not."""
    try:
        with temporary_next_to(folder / "image.png"):
            pass
    except NotADirectoryError as error:
        raise ValueError(f"{folder} is a file or inside one; choose a folder") from error
    except OSError as error:
        raise ValueError(f"{folder}: no file can be written here: {error.strerror}; choose another folder") from error


def write_new(names: Iterator[Path], image: GeneratedImage) -> Path:
    """Write an image with its metadata under the first name that is free -> that name."""
    content = png_bytes(image.image, png_info(image.info))
    for path in names:
        with contextlib.suppress(FileExistsError):
            return save_bytes(path, content, replace=False)
    raise AssertionError("names are unlimited")


def png_bytes(image: Image.Image, info: PngInfo | None = None) -> bytes:
    """The content of a PNG file."""
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=info)
    return data.getvalue()


def png_info(info: Mapping[str, Any]) -> PngInfo:
    """The PNG's text chunk with `info` as ASCII JSON."""
    chunk = PngInfo()
    chunk.add_text(METADATA_KEY, json.dumps(info))
    return chunk


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read the settings that an image was generated with; raise ValueError if the file holds none."""
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(METADATA_KEY)
    except (Image.DecompressionBombError, SyntaxError, ValueError) as error:  # PIL's errors for corrupt files
        raise ValueError(f"{path}: cannot read the metadata of this image ({error})") from error
    if text is None:
        raise ValueError(
            f"{path}: no settings in the metadata; only PNG files written by this project's scripts have them"
        )
    try:
        info = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the metadata are corrupt ({error})") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path}: the metadata are corrupt (expected a JSON object, got {type(info).__name__})")
    return info


def checked(image: GeneratedImage, safety: Check | None) -> GeneratedImage:
    """Run the safety check once; record "off" in the metadata if there is none."""
    if image.checked:
        return image
    if safety is None:
        return image._replace(info={**image.info, "safety": "off", "flagged": None}, checked=True)
    return safety(image)


def marked(image: GeneratedImage, watermark: Watermark | None) -> GeneratedImage:
    """Watermark the image if it is large enough and has generated pixels; record the method in the metadata."""
    pixels, text = image.image, None
    if watermark is not None and (image.generated is None or image.generated.getbbox() is not None):
        pixels, done = watermark(image.image)
        text = str(watermark) if done else None
        if done and image.generated is not None:
            pixels, text = (
                Image.composite(pixels, image.image, image.generated),
                f"{text}, in the generated pixels only",
            )
    return image._replace(image=pixels, info={**image.info, "watermark": text})


class Output:
    """Output folder of the scripts that generate from prompts or classes.

    safety: None skips the check, which the metadata record. samples: path pattern of the images in the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        watermark: Watermark | None = None,
        safety: Check | None = None,
        samples: str = "samples/{:05}.png",
    ) -> None:
        self.watermark, self.safety = watermark, safety
        names = Path(folder) / samples
        self.samples = NumberedFiles(names.parent, names.name)
        self.grids = NumberedFiles(folder, "grid-{:04}.png")

    def checked(self, image: GeneratedImage) -> GeneratedImage:
        """The image after the safety check, for grids and arrays; saving checks what is not yet checked."""
        return checked(image, self.safety)

    def save_sample(self, image: GeneratedImage) -> Path:
        return self.samples.save(marked(self.checked(image), self.watermark))

    def save_grid(self, image: GeneratedImage) -> Path:
        return self.grids.save(marked(self.checked(image), self.watermark))


class NamedOutput:
    """Output folder of the scripts that change images: a result is named as its source, or `x-1.png` if taken."""

    def __init__(self, folder: str | Path, watermark: Watermark | None = None, safety: Check | None = None) -> None:
        self.folder, self.watermark, self.safety = Path(folder), watermark, safety
        make_folder(self.folder)

    def save(self, image: GeneratedImage, stem: str) -> Path:
        if Path(stem).name != stem:
            raise ValueError(f"{stem!r}: expected the name of an image without folders")
        names = itertools.chain([f"{stem}.png"], (f"{stem}-{k}.png" for k in itertools.count(1)))
        return write_new((self.folder / name for name in names), marked(checked(image, self.safety), self.watermark))
