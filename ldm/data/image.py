"""Conversion between image files, PIL images and float32 arrays (H, W, 3) in [-1, 1].

`load_image` converts every file to 8-bit RGB:

| file | result |
|---|---|
| EXIF orientation 1..8 | turned upright |
| alpha, in any form (RGBA, LA, PA, a transparent palette entry, grey level or color) | composited over white |
| palette, 1-bit, grey | RGB |
| 16-bit grey (`I;16`, `I`) | divided by 257 and rounded; wider integers are clipped to 16 bits first |
| float grey (`F`) | read as [0, 1] if the largest value is at most 1, else as [0, 255]; clipped |
| TIFF whose zero is white | inverted |
| CMYK, YCbCr, LAB, HSV | converted to RGB |
| animations | the first frame |
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:  # scripts load images before torch, so that a bad file is reported at once
    from torch import Tensor

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2", ".avif"}
)
MAX_PIXELS = 178_956_970  # 0.5 GiB as RGB; PIL itself refuses more
MAX_STRETCH = 1.02  # of the sides' ratio, between two images that belong together
WHITE = (255, 255, 255)
_SIDES = (256, 257)  # TIFF tags: width and height as stored
_PHOTOMETRIC = 262  # TIFF tag; 0 means WhiteIsZero
_ORIENTATION, _QUARTER_TURNS = 274, (5, 6, 7, 8)  # EXIF tag; its values that swap width and height
RESAMPLING = {name: Image.Resampling[name.upper()] for name in ("nearest", "box", "bilinear", "bicubic", "lanczos")}
Size = int | tuple[int, int]  # the side of a square, or (height, width)
PathType = str | PathLike[str]


class View(NamedTuple):
    """A scaling, a crop and perhaps a flip, applied in this order to an image and to its segmentation map."""

    scaled: tuple[int, int]  # width, height
    box: tuple[int, int, int, int]  # left, top, right, bottom in the scaled image
    mirrored: bool = False

    def apply(self, image: Image.Image, interpolation: str = "bicubic") -> Image.Image:
        if image.size != self.scaled:
            image = image.resize(self.scaled, RESAMPLING[interpolation])
        if self.box != (0, 0, *image.size):
            image = image.crop(self.box)
        return ImageOps.mirror(image) if self.mirrored else image


class BadImageError(ValueError):
    """A file that is not a usable image; the message begins with its path."""

    def __init__(self, path: PathType, reason: str | None = None) -> None:
        # PyTorch re-raises an error of a data worker from its traceback as one text: its last line is the message.
        super().__init__(str(path).rstrip().rpartition("BadImageError: ")[2] if reason is None else f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.reason)


def load_image(
    path: PathType,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = WHITE,
    content: bytes | None = None,
) -> Image.Image:
    """Load an image as 8-bit RGB, upright and opaque (see the table above).

    content: the bytes of the file, where `path` only names it (a member of an archive).
    Raises BadImageError with the path for a file that is missing, empty, truncated, not an image, or larger than
    `max_pixels`.
    """
    with _opened(path, max_pixels, content) as image:
        loaded = to_rgb(_decoded(image), background)
    return loaded


def image_size(path: PathType, content: bytes | None = None) -> tuple[int, int]:
    """Return (width, height) of an upright image from its header, without decoding it; errors as in `load_image`."""
    with _opened(path, MAX_PIXELS, content) as image:
        # Pillow decodes a PNG that has nothing of this before its pixels.
        in_header = image.format != "PNG" or image.info.keys() & {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}
        turned = in_header and image.getexif().get(_ORIENTATION, 1) in _QUARTER_TURNS
        if turned and image.format == "TIFF":  # recent versions of Pillow give the upright size
            tags = dict(getattr(image, "tag_v2", {}))
            turned = image.size == tuple(tags.get(tag) for tag in _SIDES)
        return (image.height, image.width) if turned else (image.width, image.height)


def load_like(path: PathType, image: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Load an image that belongs to another; raise BadImageError as `load_image` does, and for other proportions."""
    loaded = load_image(path, max_pixels)
    stretch = loaded.width * image.height / (loaded.height * image.width)
    if not 1 / MAX_STRETCH <= stretch <= MAX_STRETCH:
        sizes = f"{loaded.width}x{loaded.height}, but its image is {image.width}x{image.height}"
        raise BadImageError(path, f"is {sizes}: both must have the same proportions")
    return loaded


def load_labels(path: PathType, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Load a map of class numbers 0..255, stored as grey levels or palette indices -> mode L.

    Raises BadImageError as `load_image` does, and for color images.
    """
    with _opened(path, max_pixels) as image:
        if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
            raise BadImageError(path, f"mode {image.mode} is not a map of class numbers (grey levels or a palette)")
        step = _grey_step(image)
        labels = np.asarray(image) // step
    if labels.min(initial=0) < 0 or labels.max(initial=0) > 255:
        raise BadImageError(path, f"class numbers from {labels.min()} to {labels.max()}, expected 0 .. 255")
    return Image.fromarray(labels.astype(np.uint8))


def load_levels(path: PathType, max_pixels: int = MAX_PIXELS, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    """Load grey levels (8 to 32 bits, integer or float) -> float32 (H, W), upright and unscaled; color becomes grey.

    Raises BadImageError as `load_image` does, and for values that are not finite.
    """
    with _opened(path, max_pixels) as image:
        image = _decoded(image)
        grey = image if image.mode.startswith(("I", "F")) else to_rgb(image, background).convert("L")
        levels = np.asarray(grey, dtype=np.float32)
    if not np.isfinite(levels).all():
        raise BadImageError(path, "some values are not finite")
    return levels


def to_rgb(image: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Convert a PIL image of any mode to RGB, alpha composited over `background`. Ignores the EXIF orientation."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image if type(image) is Image.Image else image.copy()
    if image.mode.startswith("I"):
        return Image.fromarray(_rgb_from_integers(image, background))
    if image.mode == "F":
        return Image.fromarray(_grey_from_floats(image)).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # None is for conversions in place
        return converted
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*background, 255))
        canvas.alpha_composite(rgba)
        return canvas.convert("RGB")
    return image.convert("RGB")


def to_array(image: Image.Image) -> np.ndarray:
    """Convert a PIL image to float32 (H, W, 3) in [-1, 1]."""
    return np.asarray(to_rgb(image), dtype=np.float32) / 127.5 - 1.0


def from_array(array: np.ndarray) -> Image.Image:
    """Convert float (H, W, 3), (H, W, 1) or (H, W) in [-1, 1] to PIL, rounded to the nearest of 256 levels and clipped.

    Raises ValueError for another shape and for values that are not finite.
    """
    array = np.asarray(array)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        raise ValueError(f"image of shape {array.shape}: expected (H, W, 3), (H, W, 1) or (H, W)")
    if bad := np.count_nonzero(~np.isfinite(array)):
        raise ValueError(f"image of shape {array.shape}: {bad} values are not finite")
    levels = np.rint((array.astype(np.float64) + 1.0) * 127.5)
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def from_tensor(x: Tensor) -> Image.Image:
    """Convert a tensor (3, H, W) or (1, H, W) in [-1, 1], any device and float type, to PIL as `from_array` does."""
    if x.ndim != 3 or x.shape[0] not in (1, 3):
        raise ValueError(f"image of shape {tuple(x.shape)}: expected (3, H, W) or (1, H, W), not a batch")
    return from_array(x.detach().float().cpu().permute(1, 2, 0).numpy())


def cover(image: Image.Image, size: Size) -> tuple[int, int]:
    """Return (width, height) of the smallest image with the proportions of `image` that covers `size`."""
    height, width = height_and_width(size)
    scale = max(height / image.height, width / image.width)
    return max(width, round(image.width * scale)), max(height, round(image.height * scale))


def crop_box(image_size: tuple[int, int], size: Size, at_random: bool = False) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a crop of `size` from an image of `image_size` (width, height).

    The crop is central, or at a random position by Python's global generator. ValueError if it exceeds the image.
    """
    height, width = height_and_width(size)
    left, top = image_size[0] - width, image_size[1] - height
    if left < 0 or top < 0:
        sizes = f"{height}x{width} (height x width) from an image of {image_size[1]}x{image_size[0]}"
        raise ValueError(f"crop of {sizes}: resize it first")
    left, top = (random.randint(0, left), random.randint(0, top)) if at_random else (left // 2, top // 2)
    return left, top, left + width, top + height


def height_and_width(size: Size) -> tuple[int, int]:
    """Return (height, width) of a side or a pair; raise ValueError unless they are positive integers."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ValueError(f"size {size!r}: expected a positive integer or (height, width)")
    return sides


@contextmanager
def _opened(path: PathType, max_pixels: int, content: bytes | None = None) -> Iterator[Image.Image]:
    """Open an image without decoding it; any error inside the block becomes a BadImageError with the path."""
    try:
        # An open file, not its name: PIL 13.0 memory-maps uncompressed TIFFs by name and misrotates orientations 5..8.
        with Path(path).open("rb") if content is None else io.BytesIO(content) as file, Image.open(file) as image:
            size, pixels = f"{image.width}x{image.height}", image.width * image.height
            if pixels > max_pixels:
                raise BadImageError(path, f"{size} is {pixels:,} pixels, more than max_pixels {max_pixels:,}")
            yield image
    except (BadImageError, MemoryError):
        raise
    except Exception as error:  # PIL's decoders share no base class of errors: a broken file can raise nearly anything
        raise BadImageError(path, _why_broken(Path(path), error, content)) from error


def _decoded(image: Image.Image) -> Image.Image:
    """Decode an opened image: upright, and as its file means it where Pillow keeps the stored values."""
    step, raw_mode = _grey_step(image), _raw_mode(image)
    white_is_zero = image.format == "TIFF" and dict(getattr(image, "tag_v2", {})).get(_PHOTOMETRIC) == 0
    image.load()
    transparent = image.info.get("transparency")
    if image.format == "PNG" and raw_mode == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)  # Pillow decodes the upper 8 bits
    elif image.format == "PNG" and isinstance(transparent, int):
        image.info["transparency"] = transparent * step
    image = _upright(image)
    if white_is_zero and image.mode == "I;16":  # Pillow inverts up to 8 bits
        image = Image.fromarray(65535 - np.asarray(image))
    elif white_is_zero and image.mode == "F":
        values = np.asarray(image)
        image = Image.fromarray((1 if values.max(initial=0) <= 1 else 255) - values)
    return image


def _raw_mode(image: Image.Image) -> str:
    """Return the mode of the stored pixels of an opened image that is not decoded yet, such as "L;4"."""
    arguments = image.tile[0].args if isinstance(image, ImageFile.ImageFile) and image.tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _grey_step(image: Image.Image) -> int:
    """Return the difference of neighbouring grey levels: Pillow scales 2- and 4-bit levels to 0 .. 255."""
    raw_mode = _raw_mode(image)
    return 85 if raw_mode.startswith("L;2") else 17 if raw_mode.startswith("L;4") else 1


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are decoded already: unreadable EXIF does not matter
        return image


def _rgb_from_integers(image: Image.Image, background: tuple[int, int, int]) -> np.ndarray:
    values = np.asarray(image).astype(np.int64)
    grey = ((np.clip(values, 0, 65535) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257
    rgb = np.stack([grey] * 3, axis=-1)  # (H, W, 3)
    if isinstance(transparent := image.info.get("transparency"), int):
        rgb[values == transparent] = background
    return rgb


def _grey_from_floats(image: Image.Image) -> np.ndarray:
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("some values are not finite")
    scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
    return np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)


def _why_broken(path: Path, error: Exception, content: bytes | None) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if content is None and path.is_dir():
        return "a folder, not a file"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels (a decompression bomb?): {error}"
    if not isinstance(error, UnidentifiedImageError):
        return f"cannot be decoded ({str(error) or type(error).__name__})"
    if content is None:
        with path.open("rb") as file:
            content = file.read(512)
    head = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "empty file"
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page, not an image (a failed download?)"
    if head.startswith((b"<?xml", b"<svg")):
        return "XML or SVG, not a pixel format"
    return "not an image in a known format"
