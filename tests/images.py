"""Images and masks of noise."""

import numpy as np
from PIL import Image


def make_image(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def hole(width: int = 24, height: int = 16) -> Image.Image:
    """White inside, with edges just under and just over half white."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[3:10, 4:17] = 127
    mask[3:10, 5:17] = 128
    mask[3:10, 6:17] = 255
    return Image.fromarray(mask)
