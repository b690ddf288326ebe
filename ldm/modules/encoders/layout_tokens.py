"""Bounding boxes as token sequences, the condition `coordinates_bbox` of the layout-to-image models.

The encoding is the one that the released OpenImages model was trained on (LDM, arXiv 2112.10752, appendix; after Jahn et al. 2021,
arXiv 2105.06458): 30 objects of three tokens each, then two tokens for the crop, 92 in all. Of a vocabulary of 8192, positions take the
numbers of a 90x90 grid in reading order, classes their own numbers (a group of objects counts as another class), and 8191 is "nothing".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

FULL = (0.0, 0.0, 1.0, 1.0)  # the crop that is all of the picture
OBJECT_TOKENS, CROP_TOKENS = 3, 2

Region = tuple[float, float, float, float]  # x, y of the upper left corner, width, height, each a share of the picture


class Box(NamedTuple):
    """One object: its class, where it is, and whether the box holds a group of such objects."""

    category: int
    region: Region
    is_group: bool = False


class Layout(NamedTuple):
    """What a token sequence says; the boxes are shares of the whole picture, of which `crop` is seen."""

    boxes: list[Box]
    crop: Region


@dataclass(frozen=True)
class LayoutTokens:
    """Boxes to tokens and back.

    num_classes: object classes. max_objects: objects in a sequence. vocab_size: tokens there are, the last one is "nothing".
    encode_crop: boxes are told of the whole picture, and two more tokens say which part is seen; else boxes are told of that part.
    group_flag: a box that holds a group has the token category + num_classes.
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
                f"num_classes {self.num_classes}: with groups {needed} tokens, of vocab_size {self.vocab_size} less one"
            )
        if self.max_objects < 1:
            raise ValueError(f"max_objects {self.max_objects}: choose 1 or more")

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return OBJECT_TOKENS * self.max_objects + (CROP_TOKENS if self.encode_crop else 0)

    @property
    def none(self) -> int:
        """The token for "nothing"."""
        return self.vocab_size - 1

    @property
    def side(self) -> int:
        """Positions along each side of the grid."""
        return math.isqrt(self.vocab_size)

    def encode(self, boxes: Sequence[Box], crop: Region = FULL, mirrored: bool = False) -> np.ndarray:
        """Tokens of the boxes that the crop shows, in their order -> (length,) int64.

        crop: the part of the picture that is seen. mirrored: it is seen mirrored left to right.
        Raises ValueError for a class that there is not and for more boxes than a sequence holds.
        """
        seen = [box for box in boxes if _meet(box.region, crop)]
        if len(seen) > self.max_objects:
            raise ValueError(f"{len(seen)} boxes: a sequence holds {self.max_objects}")
        frame = FULL if self.encode_crop else crop
        tokens = [
            token
            for box in seen
            for token in (self._class_token(box), *self._corners(_within(box.region, frame, mirrored)))
        ]
        tokens += [self.none] * (OBJECT_TOKENS * (self.max_objects - len(seen)))
        if self.encode_crop:
            tokens += self._corners(_within(crop, FULL, mirrored))
        return np.array(tokens, dtype=np.int64)

    def decode(self, tokens: Iterable[int]) -> Layout:
        """What a sequence says, positions to the nearest of the grid; tokens that say nothing sensible are left out."""
        tokens = [int(token) for token in tokens]
        if len(tokens) != self.length:
            raise ValueError(f"{len(tokens)} tokens: a sequence has {self.length}")
        end = OBJECT_TOKENS * self.max_objects
        boxes = []
        for category, first, last in zip(*(tokens[i:end:OBJECT_TOKENS] for i in range(OBJECT_TOKENS))):
            group, number = divmod(category, self.num_classes)
            if group <= int(self.group_flag) and max(first, last) < self.side**2:
                boxes.append(Box(number, self._region(first, last), bool(group)))
        return Layout(boxes, self._region(*tokens[end:]) if self.encode_crop else FULL)

    def _class_token(self, box: Box) -> int:
        if not 0 <= box.category < self.num_classes:
            raise ValueError(f"class {box.category}: expected 0 .. {self.num_classes - 1}")
        return box.category + self.num_classes * (box.is_group and self.group_flag)

    def _corners(self, region: Region) -> tuple[int, int]:
        x, y, width, height = region
        return self._position(x, y), self._position(x + width, y + height)

    def _position(self, x: float, y: float) -> int:
        column, row = (round(min(max(share, 0.0), 1.0) * (self.side - 1)) for share in (x, y))
        return row * self.side + column

    def _region(self, first: int, last: int) -> Region:
        (y, x), (bottom, right) = (divmod(token, self.side) for token in (first, last))
        return tuple(value / (self.side - 1) for value in (x, y, right - x, bottom - y))


def _meet(a: Region, b: Region) -> bool:
    """Whether two regions share an area."""
    return all(min(a[i] + a[i + 2], b[i] + b[i + 2]) > max(a[i], b[i]) for i in (0, 1))


def _within(region: Region, frame: Region, mirrored: bool) -> Region:
    """The part of `region` in `frame`, as shares of the frame."""
    (left, right), (top, bottom) = (
        tuple(min(max((edge - frame[i]) / frame[i + 2], 0.0), 1.0) for edge in (region[i], region[i] + region[i + 2]))
        for i in (0, 1)
    )
    return (1 - right if mirrored else left), top, right - left, bottom - top
