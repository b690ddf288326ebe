"""Captions, grids, plots and segmentation maps as PIL images, in Pillow's built-in font."""

from __future__ import annotations

import colorsys
import math
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

if TYPE_CHECKING:  # torch takes seconds to import and is not needed for captions and grids of PIL images
    from torch import Tensor

    ImageLike = Image.Image | np.ndarray | Tensor

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

DARK, LIGHT = "#20242b", "#f2f3f5"  # text on light and on dark backgrounds
FRAME, WHITE = "#d5d9e0", "#ffffff"
ASCII = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\xd7", "''\"\"--x")  # typographic signs
GOLDEN_RATIO = 0.618033988749895  # step of hue between successive labels, so that dozens of labels differ


def text_image(size: tuple[int, int], lines: str | Sequence[str], font_size: int = 10) -> Image.Image:
    """Return a white image of `size` (width, height) pixels with black text; the text is wrapped, and cut with "...".

    lines: a string that may contain line breaks, or one string per line.
    """
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"size {size}: width and height of a text image must be at least 1 pixel")
    image = Image.new("RGB", (width, height), WHITE)
    font, margin = ImageFont.load_default(font_size), max(1, font_size // 5)
    text = lines if isinstance(lines, str) else "\n".join(str(line) for line in lines)
    rows = _wrap(text, font, width - 2 * margin, max(1, (height - 2 * margin) // _line_height(font)))
    _write_rows(ImageDraw.Draw(image), rows, font, (margin, margin), "black")
    return image


def grid(
    images: Sequence[ImageLike] | Tensor | np.ndarray,
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    padding: int = 2,
    background: str = WHITE,
) -> Image.Image:
    """Return one image with all `images` in reading order, each centered in a cell of the largest one's size.

    images: see `to_image`. captions: one per image, written below it in at most two rows. columns: None for a square
    grid. padding: pixels around each cell. Without captions the layout is that of torchvision's make_grid; a
    single image is returned unchanged.
    """
    cells = [to_image(image) for image in images]
    if not cells:
        raise ValueError("grid needs at least one image")
    if captions is not None and len(captions) != len(cells):
        raise ValueError(f"{len(captions)} captions for {len(cells)} images: pass one per image")
    if padding < 0:
        raise ValueError(f"padding {padding}: must be 0 or more")
    if len(cells) == 1 and captions is None:
        return cells[0]
    columns = min(math.isqrt(len(cells) - 1) + 1 if columns is None else columns, len(cells))
    if columns < 1:
        raise ValueError(f"columns {columns}: must be 1 or more")

    width, height = max(image.width for image in cells), max(image.height for image in cells)
    font_size = min(28, max(11, width // 12))
    font, gap = ImageFont.load_default(font_size), font_size // 3  # gap: between an image and its caption
    texts = [_wrap(str(text), font, width, max_rows=2) for text in captions or ()]
    text_height = max(map(len, texts)) * _line_height(font) + gap if texts else 0
    step_x, step_y = width + padding, height + text_height + padding
    size = (columns * step_x + padding, -(-len(cells) // columns) * step_y + padding)

    sheet = Image.new("RGB", size, background)
    red, green, blue = ImageColor.getrgb(background)[:3]
    draw, color = ImageDraw.Draw(sheet), DARK if 0.299 * red + 0.587 * green + 0.114 * blue > 127 else LIGHT
    for k, image in enumerate(cells):
        x, y = padding + k % columns * step_x, padding + k // columns * step_y
        sheet.paste(image, (x + (width - image.width) // 2, y + (height - image.height) // 2))
        if texts and padding > 1:
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline=FRAME)
        if texts:
            _write_rows(draw, texts[k], font, (x, y + height + gap), color, width=width)
    return sheet


class Curve(NamedTuple):
    """Points (x, y) of a line, its label and its color."""

    points: Sequence[tuple[float, float]]
    label: str
    color: tuple[int, ...]


def plot(
    curves: Sequence[Curve],
    title: str,
    x_label: str,
    limits: tuple[float, float],
    size: tuple[int, int] = (560, 400),
    x_ticks: Sequence[float] | None = None,
) -> Image.Image:
    """Return curves as one image of `size` (width, height), with a logarithmic y axis that spans `limits`.

    Points without a positive finite y are left out, and limits without one are 0.1 to 1. x_ticks: numbers on the x
    axis; None for those of the points.
    """
    scale = 2  # drawn larger, then reduced: smooth lines
    width, height = (scale * side for side in size)
    font, gap = ImageFont.load_default(12 * scale), 8 * scale
    legend = max([100 * scale, *(math.ceil(font.getlength(curve.label)) + 5 * gap for curve in curves)])
    left, top, right, bottom = 56 * scale, 32 * scale, width - legend, height - 48 * scale
    image = Image.new("RGB", (width, height), WHITE)
    draw = ImageDraw.Draw(image)
    xs = sorted({x for curve in curves for x, _ in curve.points}) or [0.0]
    x0, x1 = (xs[0], xs[-1]) if xs[-1] > xs[0] else (xs[0] - 1, xs[0] + 1)
    ends = [math.log10(y) for y in limits if math.isfinite(y) and y > 0] or [-1.0, 0.0]
    margin = max(0.05, 0.05 * (ends[-1] - ends[0]))
    y0, y1 = ends[0] - margin, ends[-1] + margin

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    steps = range(1, 10) if y1 - y0 < 0.5 else (1, 2, 5) if y1 - y0 < 3 else (1,)
    ticks = [m * 10.0**k for k in range(math.floor(y0), math.ceil(y1) + 1) for m in steps]
    for tick in (tick for tick in ticks if y0 <= math.log10(tick) <= y1):
        _, y = at(x0, math.log10(tick))
        draw.line((left, y, right, y), fill=FRAME, width=scale)
        draw.text((left - gap, y), f"{tick:g}", fill=DARK, font=font, anchor="rm")
    every = -(-len(xs) // 12)
    for x_value in xs[::every] if x_ticks is None else [tick for tick in x_ticks if x0 <= tick <= x1]:
        x, _ = at(x_value, y0)
        draw.line((x, bottom, x, bottom + gap / 2), fill=DARK, width=scale)
        draw.text((x, bottom + gap), f"{x_value:g}", fill=DARK, font=font, anchor="ma")
    draw.line((left, top, left, bottom, right, bottom), fill=DARK, width=scale)
    draw.text(((left + right) / 2, height - gap), x_label, fill=DARK, font=font, anchor="mb")
    draw.text((left, gap), title, fill=DARK, font=font)
    for number, curve in enumerate(curves):
        points = [at(x, math.log10(y)) for x, y in curve.points if math.isfinite(y) and y > 0]
        draw.line(points, fill=curve.color, width=2 * scale, joint="curve")
        for x, y in points:
            draw.ellipse((x - 2 * scale, y - 2 * scale, x + 2 * scale, y + 2 * scale), fill=curve.color)
        y = top + gap + number * 16 * scale
        draw.line((right + gap, y, right + 3 * gap, y), fill=curve.color, width=3 * scale)
        draw.text((right + 4 * gap, y), curve.label, fill=DARK, font=font, anchor="lm")
    return image.resize(size, Image.Resampling.LANCZOS)


def to_image(image: ImageLike) -> Image.Image:
    """Return an RGB image of a PIL image, a uint8 array (H, W[, 1|3]) or a float tensor (1|3, H, W) in [-1, 1]."""
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    if isinstance(image, np.ndarray):
        array = image
        if array.dtype != np.uint8:
            raise TypeError(f"array of {array.dtype}: expected uint8 (H, W, 3), or a float tensor in [-1, 1]")
    else:
        if not image.is_floating_point():
            raise TypeError(f"tensor of {image.dtype}: expected a float tensor (use labels_to_rgb for labels)")
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"tensor of shape {tuple(image.shape)}: expected (3, H, W) or (1, H, W)")
        scaled = (image.detach().cpu().float().clamp(-1, 1) + 1) * 127.5
        array = scaled.nan_to_num(0.0).round().byte().permute(1, 2, 0).numpy()  # (H, W, C)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def palette(n_labels: int) -> np.ndarray:
    """Return one color per label, (n_labels, 3) uint8, the same in every run; label 0 is nearly black."""
    if n_labels < 1:
        raise ValueError(f"n_labels {n_labels}: must be 1 or more")
    colors = [(0.07, 0.07, 0.09)]
    for k in range(1, n_labels):
        ring = k // 12 % 3  # a dozen hues look distinct; after them, saturation and value change
        colors.append(colorsys.hsv_to_rgb(k * GOLDEN_RATIO % 1.0, (0.75, 0.45, 0.9)[ring], (0.95, 0.85, 0.6)[ring]))
    return np.round(255 * np.array(colors)).astype(np.uint8)


def labels_to_rgb(labels: Tensor, n_labels: int | None = None) -> Tensor:
    """Return segmentation maps in the colors of `palette`, (B, 3, H, W) float in [-1, 1].

    labels: (B, H, W) integers, or (B, C, H, W) scores or one-hot maps, of which the argmax is shown.
    """
    if labels.ndim == 4:
        n_labels, labels = labels.shape[1], labels.argmax(1)
    if labels.ndim != 3 or labels.is_floating_point():
        shape = tuple(labels.shape)
        raise ValueError(f"labels of shape {shape}, {labels.dtype}: expected integers (B, H, W) or scores (B, C, H, W)")
    labels = labels.long()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (n_labels is not None and high >= n_labels):
        raise ValueError(f"labels from {low} to {high}: expected 0..{n_labels - 1 if n_labels else 'n_labels - 1'}")
    colors = labels.new_tensor(palette(n_labels or high + 1))  # (n_labels, 3)
    return colors[labels].permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, H, W, 3) -> (B, 3, H, W)


def _line_height(font: Font) -> int:
    return round(1.3 * getattr(font, "size", 10))


def _wrap(text: str, font: Font, width: int, max_rows: int) -> list[str]:
    """Return `text` in at most `max_rows` rows of at most `width` pixels; a cut text ends in "..."."""
    text = text[: (max_rows + 1) * max(10, width)]  # more cannot fit
    rows: list[str] = []
    for paragraph in _to_ascii(text).splitlines() or [""]:
        row = ""
        for word in paragraph.split():
            joined = f"{row} {word}" if row else word
            if font.getlength(joined) <= width:
                row = joined
                continue
            if row:
                rows.append(row)
            while len(word) > 1 and font.getlength(word) > width:  # split a word that is wider than a row
                lengths = range(1, len(word))
                cut = max(1, bisect_right(lengths, width, key=lambda n: math.ceil(font.getlength(word[:n]))))
                rows.append(word[:cut])
                word = word[cut:]
            row = word
        rows.append(row)
    if len(rows) > max_rows:
        last = rows[max_rows - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        rows[max_rows - 1 :] = [last.rstrip() + "..."]
    return rows


def _to_ascii(text: str) -> str:
    """Return `text` in ASCII, which the font covers: accents are dropped, other letters become "?"."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return plain.translate(ASCII).encode("ascii", "replace").decode("ascii")


def _write_rows(
    draw: ImageDraw.ImageDraw,
    rows: Sequence[str],
    font: Font,
    at: tuple[int, int],
    color: str,
    width: int | None = None,
) -> None:
    """Write rows of text downwards from the corner `at`, centered in `width` if given."""
    x, y = at
    for k, row in enumerate(rows):
        indent = 0 if width is None else max(0, round((width - font.getlength(row)) / 2))
        draw.text((x + indent, y + k * _line_height(font)), row, fill=color, font=font)
