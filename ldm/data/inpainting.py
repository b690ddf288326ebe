"""Holes in the pictures of a folder: what an inpainting model is trained on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ldm.data.folder import ImageFolder

MAX_STROKES, MAX_BOXES = 5, 4


class InpaintingFolder(ImageFolder):
    """A folder of pictures with a hole drawn at random in each: free-hand strokes or boxes (after LaMa, arXiv 2109.07161, section 3.3).

    Beside what ImageFolder gives, whose parameters are all taken: `mask` float32 (H, W, 1), 1 in the hole and -1 elsewhere, and
    `masked_image` float32 (H, W, 3) in [-1, 1], black in the hole. The random numbers are torch's, which the data module seeds by sample.
    fixed_holes: each picture's hole follows from its place in the folder, so that validation is the same each time.
    """

    def __init__(self, root: str | None = None, split: str | None = "train", fixed_holes: bool | None = None, **options: Any) -> None:
        super().__init__(root, split=split, **options)
        self.fixed_holes = split == "validation" if fixed_holes is None else fixed_holes

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        height, width, _ = item["image"].shape
        seed = index if self.fixed_holes else int(torch.randint(2**31, ()))
        hole = draw_hole(width, height, np.random.default_rng(seed))
        mask = np.where(hole, 1.0, -1.0).astype(np.float32)[..., None]
        return {**item, "mask": mask, "masked_image": np.where(mask > 0, -1.0, item["image"]).astype(np.float32)}


def draw_hole(width: int, height: int, random: np.random.Generator) -> np.ndarray:
    """A hole (height, width) of bool, never empty and never all of the picture: thick strokes or boxes, half of the time each."""
    side = min(width, height)
    for _ in range(20):
        picture = Image.new("1", (width, height))
        draw = ImageDraw.Draw(picture)
        if random.random() < 0.5:
            for _ in range(random.integers(1, MAX_STROKES + 1)):
                _stroke(draw, width, height, max(1, round(side * random.uniform(0.04, 0.16))), random)
        else:
            for _ in range(random.integers(1, MAX_BOXES + 1)):
                extent = np.array([width, height]) * random.uniform(0.1, 0.5, 2)
                corner = random.uniform(0.0, 1.0, 2) * (np.array([width, height]) - extent)
                draw.rectangle((*corner, *(corner + extent)), fill=1)
        hole = np.asarray(picture, dtype=bool)
        if 0.01 < hole.mean() < 0.9:
            return hole
    hole = np.zeros((height, width), dtype=bool)
    hole[height // 4 : math.ceil(height * 3 / 4), width // 4 : math.ceil(width * 3 / 4)] = True
    return hole


def _stroke(draw: ImageDraw.ImageDraw, width: int, height: int, thickness: int, random: np.random.Generator) -> None:
    """A line of a few bends, as a hand would draw it."""
    point = random.uniform(0.0, 1.0, 2) * (width, height)
    angle = random.uniform(0.0, 2 * math.pi)
    points = [tuple(point)]
    for _ in range(random.integers(2, 6)):
        angle += random.uniform(-1.2, 1.2)
        step = min(width, height) * random.uniform(0.1, 0.4)
        point = np.clip(point + step * np.array([math.cos(angle), math.sin(angle)]), 0, (width, height))
        points.append(tuple(point))
    draw.line(points, fill=1, width=thickness, joint="curve")
