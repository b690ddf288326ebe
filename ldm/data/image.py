"""Pictures in and out: the one place that turns files into HWC float32 in [-1, 1], and arrays back into pictures.

What `load_image` does with each kind of file:

| kind | result |
|---|---|
| EXIF orientation 1..8 | turned upright |
| alpha, in any form (RGBA, LA, PA, a transparent palette entry or color) | laid over white |
| palette, 1-bit, grey | RGB |
| 16-bit grey (`I;16`, `I`) | divided by 257 and rounded; wider integers are clipped to 16 bits first |
| float grey (`F`) | [0, 1] where the largest value is at most 1, else [0, 255]; clipped |
| CMYK, YCbCr, LAB, HSV | converted to RGB |
| animations | the first frame |
"""

from __future__ import annotations

import random
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2", ".avif"}
)
MAX_PIXELS = 178_956_970  # 0.5 GiB as RGB; PIL refuses more by itself
WHITE = (255, 255, 255)
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Size = int | tuple[int, int]  # a side of a square, or (height, width)


class View(NamedTuple):
    """What is seen of a picture: it is scaled, cut and perhaps mirrored, in this order."""

    scaled: tuple[int, int]  # width, height
    box: tuple[int, int, int, int]  # left, top, right, bottom in the scaled picture
    mirrored: bool = False

    def of(self, image: Image.Image, how: str = "bicubic") -> Image.Image:
        """`image` so seen; maps that belong to a picture are cut alike with the same view."""
        if image.size != self.scaled:
            image = image.resize(self.scaled, resampling(how))
        if self.box != (0, 0, *image.size):
            image = image.crop(self.box)
        return flip(image) if self.mirrored else image


class BadImageError(ValueError):
    """A file that is no usable picture; the message begins with its path."""

    def __init__(self, path: str | PathLike, reason: str | None = None) -> None:
        # PyTorch raises an error of a data worker anew from its traceback as one text: its last line is the message.
        super().__init__(str(path).rstrip().rpartition("BadImageError: ")[2] if reason is None else f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.reason)


def load_image(
    path: str | PathLike, max_pixels: int = MAX_PIXELS, background: tuple[int, int, int] = WHITE
) -> Image.Image:
    """The picture in a file as 8-bit RGB, upright and opaque (the table above).

    Raises BadImageError naming the path: missing, empty, truncated, an HTML page, no image at all, more than `max_pixels`.
    """
    try:
        # An open file, not its name: PIL 13.0 maps uncompressed TIFFs that it opens by name, and turns orientations 5..8 wrongly.
        with Path(path).open("rb") as file, Image.open(file) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise BadImageError(
                    path, f"{image.width}x{image.height} is {pixels:,} pixels, more than max_pixels {max_pixels:,}"
                )
            image.load()
            return to_rgb(_upright(image), background)
    except (BadImageError, MemoryError):
        raise
    except Exception as error:  # PIL's decoders have no common error: a broken file can raise nearly anything
        raise BadImageError(path, _why_broken(path, error)) from error


def to_rgb(image: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """A PIL image of any mode -> mode RGB, alpha laid over `background`. EXIF orientation is `load_image`'s part."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image if type(image) is Image.Image else image.copy()
    if image.mode.startswith("I"):
        return Image.fromarray(_rgb_from_integers(image, background))
    if image.mode == "F":
        return Image.fromarray(_grey_from_floats(image)).convert("RGB")
    if image.mode == "LAB":
        return ImageCms.profileToProfile(
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*background, 255))
        canvas.alpha_composite(rgba)
        return canvas.convert("RGB")
    return image.convert("RGB")


def to_array(image: Image.Image) -> np.ndarray:
    """A PIL image -> float32 (H, W, 3) in [-1, 1]."""
    array = np.asarray(to_rgb(image), dtype=np.float32)
    return array / 127.5 - 1.0


def from_array(array: np.ndarray) -> Image.Image:
    """float (H, W, 3), (H, W, 1) or (H, W) in [-1, 1] -> PIL, rounded to the nearest of 256 levels and clipped.

    Raises ValueError for another shape and for values that are not finite.
    """
    array = np.asarray(array)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        raise ValueError(f"picture of shape {array.shape}: expected (H, W, 3), (H, W, 1) or (H, W)")
    if not np.isfinite(array).all():
        raise ValueError(
            f"picture of shape {array.shape} holds {np.count_nonzero(~np.isfinite(array))} values that are not finite"
        )
    levels = np.rint((array.astype(np.float64) + 1.0) * 127.5)
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def from_tensor(x: Tensor) -> Image.Image:
    """Tensor (3, H, W) or (1, H, W) in [-1, 1], any device and float type -> PIL, rounded to the nearest level and clipped."""
    if x.ndim != 3 or x.shape[0] not in (1, 3):
        raise ValueError(
            f"picture of shape {tuple(x.shape)}: expected (3, H, W) or (1, H, W); pass the pictures of a batch one by one"
        )
    return from_array(x.detach().float().cpu().permute(1, 2, 0).numpy())


def load_labels(path: str | PathLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A map of class numbers 0..255 in a file of grey levels or of palette entries (which are the numbers) -> mode L, as it is stored.

    Raises BadImageError naming the path, as `load_image` does, and for files in color.
    """
    try:
        with Path(path).open("rb") as file, Image.open(file) as image:
            if image.width * image.height > max_pixels:
                raise BadImageError(path, f"{image.width}x{image.height} pixels, more than max_pixels {max_pixels:,}")
            numbers = np.asarray(image)
            if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
                raise BadImageError(
                    path, f"is of mode {image.mode}, no map of class numbers (grey levels or a palette)"
                )
    except (BadImageError, MemoryError):
        raise
    except Exception as error:
        raise BadImageError(path, _why_broken(path, error)) from error
    if numbers.min(initial=0) < 0 or numbers.max(initial=0) > 255:
        raise BadImageError(path, f"holds class numbers from {numbers.min()} to {numbers.max()}, expected 0 .. 255")
    return Image.fromarray(numbers.astype(np.uint8))


def load_depth(path: str | PathLike, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A depth map in a file of grey levels (8, 16 or 32 bits, whole or real numbers) -> float32 (H, W), as stored; of colors their grey.

    Raises BadImageError naming the path, as `load_image` does, and for values that are not finite.
    """
    try:
        with Path(path).open("rb") as file, Image.open(file) as image:
            if image.width * image.height > max_pixels:
                raise BadImageError(path, f"{image.width}x{image.height} pixels, more than max_pixels {max_pixels:,}")
            image.load()
            image = _upright(image)
            depth = np.asarray(
                image if image.mode.startswith(("I", "F")) else to_rgb(image).convert("L"), dtype=np.float32
            )
    except (BadImageError, MemoryError):
        raise
    except Exception as error:
        raise BadImageError(path, _why_broken(path, error)) from error
    if not np.isfinite(depth).all():
        raise BadImageError(path, "holds values that are not finite, no depth map")
    return depth


def cover(image: Image.Image, size: Size) -> tuple[int, int]:
    """(width, height) of the smallest picture with the proportions of `image` that covers `size`."""
    height, width = height_and_width(size)
    scale = max(height / image.height, width / image.width)
    return max(width, round(image.width * scale)), max(height, round(image.height * scale))


def resize_to_cover(image: Image.Image, size: Size, how: str = "bicubic") -> Image.Image:
    """`image` scaled, with its proportions kept, to the smallest picture that covers `size`; antialiased when it shrinks."""
    target = cover(image, size)
    return image if target == image.size else image.resize(target, resampling(how))


def center_crop(image: Image.Image, size: Size) -> Image.Image:
    """The middle (height, width) of `image`."""
    return image.crop(center_box(image.size, size))


def random_crop(image: Image.Image, size: Size, rng: random.Random | None = None) -> Image.Image:
    """A (height, width) window of `image`, every place equally likely; `rng` None is Python's global generator."""
    return image.crop(random_box(image.size, size, rng))


def center_box(of: tuple[int, int], size: Size) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the middle (height, width) of a picture of (width, height) `of`."""
    height, width = _crop_size(of, size)
    left, top = (of[0] - width) // 2, (of[1] - height) // 2
    return left, top, left + width, top + height


def random_box(of: tuple[int, int], size: Size, rng: random.Random | None = None) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a (height, width) window of a picture of (width, height) `of`, every place equally likely."""
    height, width = _crop_size(of, size)
    draw = rng or random
    left, top = draw.randint(0, of[0] - width), draw.randint(0, of[1] - height)
    return left, top, left + width, top + height


def flip(image: Image.Image) -> Image.Image:
    """`image` mirrored left to right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def height_and_width(size: Size) -> tuple[int, int]:
    """(height, width) from a side or a pair; ValueError for anything but positive integers."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ValueError(f"size {size!r}: expected a positive integer or (height, width)")
    return sides


def resampling(how: str) -> Image.Resampling:
    """PIL's filter of that name."""
    if how not in RESAMPLING:
        raise ValueError(f"interpolation {how!r}: choose one of {', '.join(RESAMPLING)}")
    return RESAMPLING[how]


def _crop_size(of: tuple[int, int], size: Size) -> tuple[int, int]:
    height, width = height_and_width(size)
    if height > of[1] or width > of[0]:
        raise ValueError(
            f"crop of {height}x{width} (height x width) from a picture of {of[1]}x{of[0]}: resize it first"
        )
    return height, width


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF says nothing about the pixels, which have been decoded already
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
        raise ValueError("holds values that are not finite")
    scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
    return np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)


def _why_broken(path: str | PathLike, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if Path(path).is_dir():
        return "a folder, not a file"
    if isinstance(error, UnidentifiedImageError):
        return _what_it_is(path)
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels (a decompression bomb?): {error}"
    return f"cannot be decoded ({str(error) or type(error).__name__})"


def _what_it_is(path: str | PathLike) -> str:
    """What a file is that PIL finds no format in."""
    with Path(path).open("rb") as file:
        head = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "empty file"
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page, not a picture (a failed download?)"
    if head.startswith((b"<?xml", b"<svg")):
        return "XML or SVG, not a pixel format"
    return "not a picture in a known format"
