"""Pictures with holes: the condition of the inpainting models (LDM, arXiv 2112.10752, section 4.5)."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ldm.data import image as pictures
from ldm.data.base import DataConfigError
from ldm.data.folder import ImageFolder


class Convention(NamedTuple):
    """How models of a family are given holes."""

    outside: float  # of the mask, whose hole is 1
    hole: float  # of the masked picture, in [-1, 1]


CONVENTIONS = {"ldm": Convention(outside=-1, hole=-1), "stable-diffusion": Convention(outside=0, hole=0)}


class Inpainting(ImageFolder):
    """Pictures as `image`, with `mask` float32 (H, W, 1), 1 in the hole and -1 elsewhere, and `masked_image` float32 (H, W, 3), the picture
    with its hole black (-1). For a folder of any kind, and a mixin of the families.

    min_masked, max_masked: the share of the picture that the hole takes: strokes and boxes are drawn until it is reached, wide ones
    as in LaMa (Suvorov et al. 2022, arXiv 2109.07161, section 2.3). whole_p: how likely the hole is the whole picture instead.
    convention: "ldm" as above; "stable-diffusion" has 0 in the place of -1, in the mask and in the hole, which is grey then.
    Other parameters are those of ImageFolder.
    """

    def __init__(
        self,
        root: str | None = None,
        min_masked: float = 0.1,
        max_masked: float = 0.5,
        whole_p: float = 0.0,
        convention: str = "ldm",
        **options: Any,
    ) -> None:
        if not 0 < min_masked <= max_masked < 1:
            raise DataConfigError(
                "min_masked", min_masked, f"with max_masked {max_masked} no range in (0, 1)", "set {param} to a share"
            )
        if not 0 <= whole_p <= 1:
            raise DataConfigError("whole_p", whole_p, "not a probability", "set {param} between 0 and 1")
        if convention not in CONVENTIONS:
            raise DataConfigError(
                "convention", convention, "no such convention", f"set {{param}} to one of {', '.join(CONVENTIONS)}"
            )
        self.min_masked, self.max_masked, self.whole_p = min_masked, max_masked, whole_p
        self.convention = CONVENTIONS[convention]
        super().__init__(root, **options)

    def _values(self, picture: Image.Image, index: int) -> dict[str, Any]:
        image = pictures.to_array(self._view(picture).of(picture, self.interpolation))
        height, width = image.shape[:2]
        whole = self.whole_p > 0 and random.random() < self.whole_p
        hole = (
            np.ones((height, width), bool)
            if whole
            else draw_hole(height, width, random.uniform(self.min_masked, self.max_masked))
        )
        masked = np.where(hole[..., None], np.float32(self.convention.hole), image)
        mask = np.where(hole[..., None], 1, self.convention.outside).astype(np.float32)
        return {self.image_key: image, "mask": mask, "masked_image": masked}


def draw_hole(height: int, width: int, share: float) -> np.ndarray:
    """Strokes and boxes that together take about `share` of the picture -> bool (height, width); Python's global generator draws them."""
    canvas = Image.new("1", (width, height))
    draw = ImageDraw.Draw(canvas)
    side = min(height, width)
    while True:
        before = canvas.copy()
        if random.random() < 0.5:
            _stroke(draw, height, width, max(1, round(side * random.uniform(0.03, 0.15))))
        else:
            w, h = (max(1, round(length * random.uniform(0.1, 0.4))) for length in (width, height))
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            draw.rectangle((left, top, left + w - 1, top + h - 1), fill=1)
        hole, last = np.asarray(canvas), np.asarray(before)
        if hole.mean() >= share:  # the nearer of the last two
            return hole if not last.any() or hole.mean() - share <= share - last.mean() else last


def _stroke(draw: ImageDraw.ImageDraw, height: int, width: int, thickness: int) -> None:
    """A line of a few bends with round ends."""
    x, y, angle = random.uniform(0, width), random.uniform(0, height), random.uniform(0, 2 * math.pi)
    for _ in range(random.randint(1, 5)):
        angle += random.uniform(-1, 1)
        length = min(height, width) * random.uniform(0.1, 0.4)
        end = (min(max(x + length * math.cos(angle), 0), width), min(max(y + length * math.sin(angle), 0), height))
        draw.line((x, y, *end), fill=1, width=thickness)
        for cx, cy in ((x, y), end):
            draw.ellipse((cx - thickness / 2, cy - thickness / 2, cx + thickness / 2, cy + thickness / 2), fill=1)
        x, y = end
