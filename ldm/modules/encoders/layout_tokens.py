"""Bounding boxes as token sequences, the condition `coordinates_bbox` of the layout-to-image models.

The encoding is that of the released OpenImages model (LDM, arXiv 2112.10752, appendix; after Jahn et al. 2021, arXiv
2105.06458): 30 objects of three tokens each (class, upper left and lower right corner), then two tokens for the crop,
92 in all. Of 8192 tokens, corners use the cells of a 90x90 grid in reading order, classes their number (groups of
objects count as further classes), and 8191 means "no object".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FULL = (0.0, 0.0, 1.0, 1.0)  # the crop that is the whole image
OBJECT_TOKENS, CROP_TOKENS = 3, 2

Region = tuple[float, float, float, float]  # x, y of the upper left corner, width, height; fractions of the image


class Box(NamedTuple):
    """One object, or a group of objects of one class."""

    category: int
    region: Region
    is_group: bool = False


class Layout(NamedTuple):
    """A decoded token sequence: boxes relative to the whole image, and the visible crop of it."""

    boxes: list[Box]
    crop: Region


@dataclass(frozen=True)
class LayoutTokens:
    """Encoder of boxes to tokens, and decoder.

    max_objects: objects per sequence. vocab_size: number of tokens; the last one means "no object".
    encode_crop: boxes are relative to the whole image, and two more tokens hold the crop; else they are relative to it.
    group_flag: the class token of a group of objects is category + num_classes.
    """

    num_classes: int
    max_objects: int = 30
    vocab_size: int = 8192
    encode_crop: bool = True
    group_flag: bool = True

    def __post_init__(self) -> None:
        needed = self.num_classes * (2 if self.group_flag else 1)
        if not 0 < needed < self.vocab_size:
            raise ValueError(
                f"num_classes {self.num_classes}: needs {needed} class tokens, groups included; "
                f"vocab_size {self.vocab_size} allows 1 to {self.vocab_size - 1}"
            )
        if self.max_objects < 1:
            raise ValueError(f"max_objects {self.max_objects}: must be 1 or more")

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return OBJECT_TOKENS * self.max_objects + (CROP_TOKENS if self.encode_crop else 0)

    @property
    def none(self) -> int:
        """Token that means "no object"."""
        return self.vocab_size - 1

    @property
    def side(self) -> int:
        """Cells along each side of the grid."""
        return math.isqrt(self.vocab_size)

    def encode(self, boxes: Sequence[Box], crop: Region = FULL, mirrored: bool = False) -> np.ndarray:
        """Return the tokens of the boxes that overlap the crop, in their order, (length,) int64.

        mirrored: the crop is flipped left to right. Raises ValueError for an unknown class or too many boxes.
        """
        visible = [box for box in boxes if _overlap(box.region, crop)]
        if len(visible) > self.max_objects:
            raise ValueError(f"{len(visible)} boxes: a sequence has room for {self.max_objects}")
        frame = FULL if self.encode_crop else crop
        tokens: list[int] = []
        for box in visible:
            if not 0 <= box.category < self.num_classes:
                raise ValueError(f"class {box.category}: expected 0 .. {self.num_classes - 1}")
            class_token = box.category + self.num_classes * (box.is_group and self.group_flag)
            tokens += [class_token, *self._corners(_relative(box.region, frame, mirrored))]
        tokens += [self.none] * (OBJECT_TOKENS * (self.max_objects - len(visible)))
        if self.encode_crop:
            tokens += self._corners(_relative(crop, FULL, mirrored))
        return np.array(tokens, dtype=np.int64)

    def decode(self, tokens: Iterable[int]) -> Layout:
        """Return the layout of a sequence, with corners on the grid; objects with invalid tokens are skipped."""
        tokens = [int(token) for token in tokens]
        if len(tokens) != self.length:
            raise ValueError(f"{len(tokens)} tokens: expected {self.length}")
        end = OBJECT_TOKENS * self.max_objects
        boxes = []
        for category, first, last in zip(*(tokens[i:end:OBJECT_TOKENS] for i in range(OBJECT_TOKENS))):
            group, number = divmod(category, self.num_classes)
            if group <= int(self.group_flag) and max(first, last) < self.side**2:
                boxes.append(Box(number, self._region(first, last), bool(group)))
        return Layout(boxes, self._region(*tokens[end:]) if self.encode_crop else FULL)

    def _corners(self, region: Region) -> tuple[int, int]:
        x, y, width, height = region
        return self._cell(x, y), self._cell(x + width, y + height)

    def _cell(self, x: float, y: float) -> int:
        column, row = (round(min(max(value, 0.0), 1.0) * (self.side - 1)) for value in (x, y))
        return row * self.side + column

    def _region(self, first: int, last: int) -> Region:
        (y, x), (bottom, right) = divmod(first, self.side), divmod(last, self.side)
        scale = self.side - 1
        return x / scale, y / scale, (right - x) / scale, (bottom - y) / scale


def _overlap(a: Region, b: Region) -> bool:
    return all(min(a[i] + a[i + 2], b[i] + b[i + 2]) > max(a[i], b[i]) for i in (0, 1))


def _relative(region: Region, frame: Region, mirrored: bool) -> Region:
    """Return the part of `region` inside `frame`, as fractions of the frame."""
    left, top, right, bottom = (
        min(max((edge - frame[i]) / frame[i + 2], 0.0), 1.0)
        for i, edge in ((0, region[0]), (1, region[1]), (0, region[0] + region[2]), (1, region[1] + region[3]))
    )
    return (1 - right if mirrored else left), top, right - left, bottom - top
