"""Captions, grids and segmentation maps as pictures (PIL), with a font that is always there."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageColor, ImageDraw, ImageFont

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

INK = "#20242b"
FRAME = "#d5d9e0"
PAPER = "#ffffff"
PUNCTUATION = {
    0x2018: "'",
    0x2019: "'",
    0x201C: '"',
    0x201D: '"',
    0x2013: "-",
    0x2014: "-",
    0xD7: "x",
}  # typographic -> ASCII
GOLDEN_ANGLE = 0.618033988749895  # turns of hue between neighboring labels: no two of the first dozens look alike


def text_image(size: tuple[int, int], lines: str | Sequence[str], font_size: int = 10) -> Image.Image:
    """White picture of `size` (width, height) pixels with `lines` in black, wrapped to its width.

    A single string may hold line breaks; each item of a list starts a new line. What does not fit in the height ends in "...".
    """
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"size {size}: width and height of a text image must be at least 1 pixel")
    image = Image.new("RGB", (width, height), PAPER)
    font, margin = _font(font_size), max(1, font_size // 5)
    text = lines if isinstance(lines, str) else "\n".join(str(line) for line in lines)
    rows = _fit(text, font, width - 2 * margin, max(1, (height - 2 * margin) // _line_height(font)))
    _write_rows(ImageDraw.Draw(image), rows, font, (margin, margin), "black")
    return image


def grid(
    images: Sequence[Any] | Tensor | np.ndarray,
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    padding: int = 2,
    background: str = PAPER,
    cell: int | None = None,
    font_size: int | None = None,
    caption_lines: int = 2,
    title: str | None = None,
) -> Image.Image:
    """All `images` in reading order on one picture, each centered in a cell of the largest one's size, over its caption.

    images: PIL pictures, uint8 arrays (H, W, 3) or float tensors (C, H, W) in [-1, 1]; a batch of either is a sequence too.
    captions: one a picture, centered below it, wrapped, at most `caption_lines` lines, then "...".
    columns: pictures in a row; by default as near to a square as the number of pictures allows.
    padding: pixels around every cell. With `captions` None, `background` "black" and no `title` the layout is torchvision's make_grid,
        which the published scripts use (there a single picture is returned as it is).
    cell: enlarge small pictures by a whole factor, pixel by pixel, until their shorter side is near `cell` pixels.
    """
    pictures = [to_picture(image) for image in images]
    if not pictures:
        raise ValueError("grid needs at least one image")
    if captions is not None and len(captions) != len(pictures):
        raise ValueError(f"{len(captions)} captions for {len(pictures)} images: give one caption an image")
    if padding < 0 or caption_lines < 1:
        raise ValueError(
            f"padding {padding}, caption_lines {caption_lines}: padding must be 0 or more, caption_lines 1 or more"
        )
    if cell is not None:
        pictures = [_enlarge(picture, cell) for picture in pictures]
    if len(pictures) == 1 and captions is None and title is None:
        return pictures[0]
    columns = min(_near_square(len(pictures)) if columns is None else columns, len(pictures))
    if columns < 1:
        raise ValueError(f"columns {columns}: a grid has at least one column")

    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    font = _font(font_size or min(28, max(11, width // 12)))
    blocks = [_fit(str(text), font, width, caption_lines) for text in captions] if captions is not None else []
    gap = max(2, font.size // 3) if blocks else 0  # between a picture and its caption
    text_height = max(map(len, blocks), default=0) * _line_height(font) + gap if blocks else 0
    rows = -(-len(pictures) // columns)
    step_x, step_y = width + padding, height + text_height + padding
    total_width = columns * step_x + padding
    head_font = _font(round(1.4 * font.size))
    head = _fit(title, head_font, total_width - 2 * padding, 3) if title else []
    top = len(head) * _line_height(head_font) + 2 * head_font.size // 2 if head else 0

    sheet = Image.new("RGB", (total_width, top + rows * step_y + padding), background)
    draw, ink = ImageDraw.Draw(sheet), _ink_on(background)
    _write_rows(draw, head, head_font, (padding, head_font.size // 2), ink, width=total_width - 2 * padding)
    for k, picture in enumerate(pictures):
        x, y = padding + k % columns * step_x, top + padding + k // columns * step_y
        sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
        if blocks and padding > 1:
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline=FRAME)
        if blocks:
            _write_rows(draw, blocks[k], font, (x, y + height + gap), ink, width=width)
    return sheet


def to_picture(image: Any) -> Image.Image:
    """RGB picture of a PIL picture, a uint8 array (H, W[, 1|3]) or a float tensor (1|3, H, W) in [-1, 1], rounded to 8 bits."""
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    import numpy as np

    if hasattr(image, "detach"):
        image = image.detach().cpu()
        if not image.is_floating_point():
            raise TypeError(
                f"a tensor of {image.dtype}: pictures are float tensors (C, H, W) in [-1, 1]; labels go through labels_to_rgb"
            )
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"a tensor of shape {tuple(image.shape)}: a picture is (3, H, W) or (1, H, W)")
        image = ((image.float().clamp(-1, 1) + 1) * 127.5).nan_to_num(0.0).round().byte().permute(1, 2, 0).numpy()
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise TypeError(
            f"an array of {array.dtype}: pictures are uint8 arrays (H, W, 3); float values in [-1, 1] go in as a tensor"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def palette(n_labels: int) -> np.ndarray:
    """One color a label, (n_labels, 3) uint8: label 0 is near black, the rest are well apart and the same in every run."""
    import colorsys

    import numpy as np

    if n_labels < 1:
        raise ValueError(f"n_labels {n_labels}: a palette has at least one color")
    colors = [(0.07, 0.07, 0.09)]
    for k in range(1, n_labels):
        ring = k // 12 % 3  # hues begin to crowd after a dozen: vary the rest
        colors.append(colorsys.hsv_to_rgb(k * GOLDEN_ANGLE % 1.0, (0.75, 0.45, 0.9)[ring], (0.95, 0.85, 0.6)[ring]))
    return np.round(255 * np.array(colors)).astype(np.uint8)


def labels_to_rgb(labels: Tensor, n_labels: int | None = None) -> Tensor:
    """Segmentation maps in colors, (B, 3, H, W) float in [-1, 1].

    labels: (B, H, W) integers, or (B, C, H, W) scores or one-hot planes, of which the largest counts (then n_labels = C).
    """
    import torch

    if labels.ndim == 4:
        n_labels, labels = labels.shape[1], labels.argmax(1)
    if labels.ndim != 3 or labels.is_floating_point():
        raise ValueError(
            f"labels of shape {tuple(labels.shape)}, {labels.dtype}: give integers (B, H, W) or scores (B, C, H, W)"
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or (n_labels is not None and highest >= n_labels):
        raise ValueError(
            f"labels from {lowest} to {highest}: they must lie in 0..{n_labels - 1 if n_labels else 'n_labels - 1'}"
        )
    colors = torch.from_numpy(palette(n_labels or highest + 1)).to(labels.device)
    return colors[labels.long()].permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, H, W, 3) -> (B, 3, H, W)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that no font has to be installed; its size is fixed where Pillow was built without FreeType."""
    font = ImageFont.load_default(size)
    if not hasattr(font, "size"):
        font.size = 10
    return font


def _line_height(font: Any) -> int:
    return round(1.3 * font.size)


def _printable(text: str) -> str:
    """`text` in what Pillow's own font can draw, which is ASCII: accents are dropped, other letters become "?"."""
    import unicodedata

    if text.isascii():
        return text
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return plain.translate(PUNCTUATION).encode("ascii", "replace").decode("ascii")


def _fit(text: str, font: Any, width: int, max_rows: int) -> list[str]:
    """`text` broken into at most `max_rows` rows of at most `width` pixels; the last one ends in "..." where something is left out."""
    text = _printable(text[: (max_rows + 1) * max(10, width)])  # a 10,000-character caption costs no more than it shows
    rows: list[str] = []
    for paragraph in text.splitlines() or [""]:
        row = ""
        for word in paragraph.split():
            joined = f"{row} {word}" if row else word
            if font.getlength(joined) <= width:
                row = joined
                continue
            if row:
                rows.append(row)
            while (
                len(word) > 1 and len(rows) <= max_rows and font.getlength(word) > width
            ):  # a word wider than the picture is cut
                cut = max(1, bisect_right(range(1, len(word)), width, key=lambda n: font.getlength(word[:n])))
                rows.append(word[:cut])
                word = word[cut:]
            row = word
            if len(rows) > max_rows:
                break
        rows.append(row)
        if len(rows) > max_rows:
            break
    if len(rows) <= max_rows:
        return rows
    last = rows[max_rows - 1]
    while last and font.getlength(last + "...") > width:
        last = last[:-1]
    return [*rows[: max_rows - 1], last.rstrip() + "..."]


def _write_rows(
    draw: ImageDraw.ImageDraw, rows: Sequence[str], font: Any, at: tuple[int, int], ink: str, width: int | None = None
) -> None:
    """Rows of text from the corner `at` down, centered where a `width` is given."""
    x, y = at
    for k, row in enumerate(rows):
        indent = 0 if width is None else max(0, round((width - font.getlength(row)) / 2))
        draw.text((x + indent, y + k * _line_height(font)), row, fill=ink, font=font)


def _enlarge(picture: Image.Image, cell: int) -> Image.Image:
    factor = max(1, round(cell / min(picture.size)))
    return (
        picture
        if factor == 1
        else picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    )


def _near_square(n: int) -> int:
    """The least number of columns with no more rows than columns."""
    columns = 1
    while columns * columns < n:
        columns += 1
    return columns


def _ink_on(background: str) -> str:
    red, green, blue = ImageColor.getrgb(background)[:3]
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 127 else "#f2f3f5"
