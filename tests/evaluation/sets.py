"""Sets of images for the tests of evaluations."""

import numpy as np

from ldm.evaluation.image_sets import ArrayImages


def bars(n: int, seed: int = 0, size: int = 16) -> ArrayImages:
    """Images of two classes, a bright column at a random place or a bright row, with a little noise."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 40, (n, size, size, 3), dtype=np.uint8), np.arange(n) % 2
    for image, label in zip(images, labels):
        at = rng.integers(size - 2)
        image[(slice(at, at + 2), slice(None)) if label else (slice(None), slice(at, at + 2))] = 230
    return ArrayImages(f"bars {seed}", images, labels)
