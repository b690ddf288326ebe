"""Lighter degradation of the released super-resolution model (LDM, arXiv 2112.10752, section 4.4).

One narrow blur instead of two, almost no noise, JPEG of high quality.
"""

from __future__ import annotations

import numpy as np

from ldm.modules.image_degradation.bsrgan import Degradation
from ldm.published import published_names

BSRGAN_LIGHT = Degradation(
    blurs=1,
    blur_scale=0.25,
    kernel_sizes=(5, 13),
    round_kernel_sizes=(5, 7),
    resized=0.8,
    noise=(1, 2),
    jpeg_quality=(80, 95),
)


def degradation_bsrgan_variant(image: np.ndarray, sf: int = 4) -> dict[str, np.ndarray]:
    """`image` uint8 (H, W, 3) -> {"image": uint8 (H // sf, W // sf, 3)}."""
    return {"image": BSRGAN_LIGHT(image, sf)}


__getattr__ = published_names(__name__)
