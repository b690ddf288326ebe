"""Images with random masks, for training inpainting models (LDM, arXiv 2112.10752, section 4.5)."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ldm.config.types import PathText, Probability
from ldm.data.base import DataConfigError, check_choice
from ldm.data.folder import ImageFolder
from ldm.data.image import View, to_array


class Convention(NamedTuple):
    """Values that a family of models expects outside and inside the hole."""

    outside: float  # in the mask, which is 1 in the hole
    hole: float  # in the masked image, in [-1, 1]


CONVENTIONS = {"ldm": Convention(outside=-1, hole=-1), "stable-diffusion": Convention(outside=0, hole=0)}


class Inpainting(ImageFolder):
    """Images as `image`, with `mask` (H, W, 1), 1 in the hole and -1 elsewhere, and `masked_image` with a black hole.

    Usable with any folder, and as a mixin of the published datasets.
    min_masked, max_masked: share of the image that the hole covers; it consists of random strokes and boxes, as wide as
    those of LaMa (Suvorov et al. 2022, arXiv 2109.07161, section 2.3).
    whole_p: probability of masking the whole image instead.
    convention: "ldm" as above; "stable-diffusion" has 0 instead of -1 in the mask, and a grey hole (0).
    Other parameters as in ImageFolder.
    """

    def __init__(
        self,
        root: PathText | None = None,
        min_masked: float = 0.1,
        max_masked: float = 0.5,
        whole_p: Probability = 0.0,
        convention: str = "ldm",
        **options: Any,
    ) -> None:
        if not 0 < min_masked <= max_masked < 1:
            problem = f"expected 0 < min_masked <= max_masked < 1, and max_masked is {max_masked}"
            raise DataConfigError("min_masked", min_masked, problem, "set {param} to a share of the image")
        check_choice("convention", convention, CONVENTIONS)
        self.min_masked, self.max_masked, self.whole_p = min_masked, max_masked, whole_p
        self.convention = CONVENTIONS[convention]
        super().__init__(root, **options)

    def _views(self, image: Image.Image, view: View, index: int) -> dict[str, Any]:
        pixels = to_array(view.apply(image, self.interpolation))
        parts = masked(pixels, self.min_masked, self.max_masked, self.whole_p, self.convention)
        return {self.image_key: pixels, **parts}


def masked(
    image: np.ndarray, least: float, most: float, whole_p: float, convention: Convention
) -> dict[str, np.ndarray]:
    """Return `mask` (H, W, 1) and `masked_image` of an image (H, W, 3) in [-1, 1], see Inpainting."""
    height, width = image.shape[:2]
    if whole_p > 0 and random.random() < whole_p:
        hole = np.ones((height, width), bool)
    else:
        hole = random_hole(height, width, random.uniform(least, most))
    mask = np.where(hole[..., None], 1, convention.outside).astype(np.float32)
    return {"mask": mask, "masked_image": np.where(hole[..., None], np.float32(convention.hole), image)}


def random_hole(height: int, width: int, share: float) -> np.ndarray:
    """Return random strokes and boxes that cover about `share` of the image -> bool (height, width)."""
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
        if hole.mean() >= share:  # the closer of the last two
            return hole if not last.any() or hole.mean() - share <= share - last.mean() else last


def _stroke(draw: ImageDraw.ImageDraw, height: int, width: int, thickness: int) -> None:
    """Draw a polyline with round ends."""
    x, y, angle = random.uniform(0, width), random.uniform(0, height), random.uniform(0, 2 * math.pi)
    for _ in range(random.randint(1, 5)):
        angle += random.uniform(-1, 1)
        length = min(height, width) * random.uniform(0.1, 0.4)
        end = (min(max(x + length * math.cos(angle), 0), width), min(max(y + length * math.sin(angle), 0), height))
        draw.line((x, y, *end), fill=1, width=thickness)
        for cx, cy in ((x, y), end):
            draw.ellipse((cx - thickness / 2, cy - thickness / 2, cx + thickness / 2, cy + thickness / 2), fill=1)
        x, y = end
