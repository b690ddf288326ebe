"""Degradation as strong as BSRGAN's (arXiv 2103.14006, section 3)."""

from __future__ import annotations

import numpy as np

from ldm.modules.image_degradation.pipeline import Degradation

BSRGAN = Degradation()


def degradation_bsrgan_variant(image: np.ndarray, sf: int = 4) -> dict[str, np.ndarray]:
    """`image` uint8 (H, W, 3) -> {"image": uint8 (H // sf, W // sf, 3)}."""
    return {"image": BSRGAN(image, sf)}
