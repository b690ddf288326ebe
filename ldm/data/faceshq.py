"""CelebA-HQ and FFHQ in the published layout:

    data/celebahq/    imgHQ00000.npy, ... (uint8, (1, 3, H, W)), or image files
    data/celebahq{train,validation}.txt    the splits: one path below celebahq/ on each line
    data/ffhq/    00000.png, ..., at any depth
    data/ffhq{train,validation}.txt

The lists are in https://github.com/CompVis/taming-transformers, folder data; without them, set `split` to train and
validation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.folder import ListedImages
from ldm.data.image import EXTENSIONS, BadImageError, to_rgb


class _CelebAHQ(ListedImages):
    """Image files, or arrays in .npy files."""

    suffixes = EXTENSIONS | {".npy"}

    def _read(self, name: str) -> Image.Image:
        return _load_npy(self.root / name, self.max_pixels) if name.lower().endswith(".npy") else super()._read(name)


class CelebAHQTrain(_CelebAHQ, root="data/celebahq", files="data/celebahqtrain.txt"):
    """Training images of CelebA-HQ."""


class CelebAHQValidation(_CelebAHQ, root="data/celebahq", files="data/celebahqvalidation.txt"):
    """Validation images of CelebA-HQ."""


class FFHQTrain(ListedImages, root="data/ffhq", files="data/ffhqtrain.txt"):
    """Training images of FFHQ."""


class FFHQValidation(ListedImages, root="data/ffhq", files="data/ffhqvalidation.txt"):
    """Validation images of FFHQ."""


def _load_npy(path: Path, max_pixels: int) -> Image.Image:
    """Load an image stored as uint8 ([1,] 3, H, W) or (H, W, 3)."""
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise BadImageError(path, f"cannot be read ({error})") from error
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or not 0 < array.size <= 3 * max_pixels:
        expected = "expected uint8 of (1, 3, H, W), (3, H, W) or (H, W, 3)"
        raise BadImageError(path, f"{array.dtype} of shape {array.shape}, {expected}")
    return to_rgb(Image.fromarray(np.ascontiguousarray(array)))
