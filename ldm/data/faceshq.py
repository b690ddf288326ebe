"""CelebA-HQ and FFHQ, in the published layout:

    data/celebahq/    imgHQ00000.npy, ... (uint8, (1, 3, H, W)), or pictures
    data/celebahq{train,validation}.txt    the split: one path below celebahq/ on each line
    data/ffhq/    00000.png, ..., at any depth
    data/ffhq{train,validation}.txt

The lists are those of https://github.com/CompVis/taming-transformers, folder data; without them say `split: train` and `split: validation`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from ldm.data import image as pictures
from ldm.data.image import EXTENSIONS, BadImageError
from ldm.data.published import ListedPictures


class _CelebAHQ(ListedPictures):
    """Pictures, or arrays in .npy files."""

    published_root = "data/celebahq"
    suffixes = EXTENSIONS | {".npy"}

    def _read(self, name: str) -> Image.Image:
        return _load_npy(self.root / name, self.max_pixels) if name.lower().endswith(".npy") else super()._read(name)


class CelebAHQTrain(_CelebAHQ):
    published_list = "data/celebahqtrain.txt"


class CelebAHQValidation(_CelebAHQ):
    published_list = "data/celebahqvalidation.txt"


class FFHQTrain(ListedPictures):
    published_root, published_list = "data/ffhq", "data/ffhqtrain.txt"


class FFHQValidation(ListedPictures):
    published_root, published_list = "data/ffhq", "data/ffhqvalidation.txt"


def _load_npy(path: Any, max_pixels: int) -> Image.Image:
    """A picture stored as uint8 ([1,] 3, H, W) or (H, W, 3)."""
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise BadImageError(path, f"cannot be read ({error})") from error
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or not 0 < array.size <= 3 * max_pixels:
        raise BadImageError(
            path, f"holds {array.dtype} of shape {array.shape}, expected uint8 of (1, 3, H, W), (3, H, W) or (H, W, 3)"
        )
    return pictures.to_rgb(Image.fromarray(np.ascontiguousarray(array)))
