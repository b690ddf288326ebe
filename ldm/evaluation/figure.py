"""Figures of cards, comparisons and sweeps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ldm.visualize import Curve, grid, plot, text_image

CELL = 64  # pixels of a small image in a figure, at least; larger ones are scaled down to 128
LARGEST = 128
COLUMNS = 10
MARGIN = 16  # pixels beside a figure of a comparison
COLORS = (
    (31, 119, 180),
    (214, 69, 65),
    (44, 160, 44),
    (148, 103, 189),
    (255, 127, 14),
    (23, 190, 207),
    (227, 119, 194),
    (127, 127, 127),
    (140, 86, 75),
    (188, 189, 34),
)


class Section(NamedTuple):
    """Rows of images under a title; every row has the same number of images."""

    title: str
    rows: Sequence[Sequence[np.ndarray]]  # uint8 (H, W, 3)


def card_figure(title: str, sections: Iterable[Section], extra: Image.Image | None = None) -> Image.Image:
    """One image with the sections one below the other, and a plot at the end."""
    blocks: list[Image.Image] = []
    for section in sections:
        images = [cell(image) for row in section.rows for image in row]
        if images:
            block = grid(images, columns=len(section.rows[0]), padding=2)
            blocks += [text_image((max(block.width, 400), 22), section.title, 12), block]
    if extra is not None:
        blocks.append(extra)
    width = max([block.width for block in blocks] or [400])
    return stacked([text_image((width, 24), title, 14), *blocks])


def cell(image: np.ndarray) -> Image.Image:
    """An image of a figure: small ones enlarged by a whole factor, large ones scaled down."""
    shown, side = Image.fromarray(image), max(image.shape[:2])
    scale = -(-CELL // side) if side < CELL else min(1.0, LARGEST / side)
    size = round(shown.width * scale), round(shown.height * scale)
    return shown.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def lettered(letter: str, figure: Image.Image) -> Image.Image:
    """A figure under a letter, with a margin on the left that parts it from the one beside it."""
    sheet = stacked([text_image((figure.width, 28), letter, 18), figure])
    return ImageOps.expand(sheet, (MARGIN, 0, 0, 0), "white")


def stacked(blocks: Sequence[Image.Image], side_by_side: bool = False) -> Image.Image:
    """Images one below the other, or side by side, on white."""
    along, across = ([block.size[k] for block in blocks] for k in ((0, 1) if side_by_side else (1, 0)))
    size = (sum(along), max(across)) if side_by_side else (max(across), sum(along))
    sheet, place = Image.new("RGB", size, "white"), 0
    for block, length in zip(blocks, along):
        sheet.paste(block, (place, 0) if side_by_side else (0, place))
        place += length
    return sheet


def distance_plot(samples: np.ndarray, held_out: np.ndarray, threshold: float) -> Image.Image:
    """Share of images whose nearest training image is nearer than x, of samples and of held-out images."""

    def curve(values: np.ndarray, label: str, color: tuple[int, ...]) -> Curve:
        ordered, n = np.sort(values), len(values)
        kept = np.unique(np.linspace(0, n - 1, min(60, n)).astype(int))
        return Curve([(round(float(ordered[k]), 4), (k + 1) / n) for k in kept], label, color)

    curves = [curve(samples, "samples", COLORS[0])]
    if len(held_out):
        curves.append(curve(held_out, "held-out", COLORS[1]))
    label = "distance to the nearest training image (RMS of pixels in [0, 1])"
    title = f"share of images that are nearer than x (flagged below {threshold:.3g})"
    limits, ticks = (
        (1 / max(len(samples), len(held_out), 2), 1.0),
        even_ticks(x for each in curves for x, _ in each.points),
    )
    return plot(curves, title, label, limits, x_ticks=ticks)


def trade_off_plot(
    groups: Mapping[str, Sequence[tuple[float, float]]], title: str, x_label: str, by_x: bool = True
) -> Image.Image:
    """Lines of points (x, y), one color for each group, y logarithmic; in the order of x unless the order is given."""
    curves = [
        Curve(sorted(points) if by_x else list(points), label, COLORS[k % len(COLORS)])
        for k, (label, points) in enumerate(groups.items())
    ]
    ys = [y for points in groups.values() for _, y in points if y > 0] or [0.1, 1.0]
    ticks = even_ticks(x for each in curves for x, _ in each.points)
    return plot(curves, title, x_label, (min(ys), max(ys)), (720, 420), ticks)


def even_ticks(values: Iterable[float]) -> list[float]:
    """About six round numbers that span the values."""
    every = list(values)
    width = (max(every) - min(every)) / 6 or 1.0
    power = 10.0 ** math.floor(math.log10(width))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= width)
    return [k * step for k in range(math.ceil(min(every) / step), math.floor(max(every) / step) + 1)]
