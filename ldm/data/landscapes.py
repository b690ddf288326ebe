"""Images with segmentation maps; landscapes from Flickr in this layout:

    data/rfw/images/    images, at any depth
    data/rfw/segmentations/    for images/a/b.jpg a map a/b.png; its grey levels or palette indices are COCO-Stuff's
                               classes 0..181, or 255 for a pixel without a class

The split is by images/train/ and images/validation/ if both exist, else by a hash of the names. The dataset of the
published model was never released; a segmentation network trained on COCO-Stuff can make maps for other images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.config.types import PathText
from ldm.data.base import DataConfigError
from ldm.data.folder import Defaults, ImageFolder
from ldm.data.image import BadImageError, Size, View, load_labels, to_array
from ldm.data.listing import existing_folder
from ldm.paths import expand_user

UNLABELED = 255


class SegmentedImages(ImageFolder):
    """Images as `image`, and `segmentation` (H, W, n_labels): one-hot classes with the crop of the image.

    root: the images. segmentation_root: the maps, .png files with the names of the images. n_labels: number of classes.
    shift_segmentation: class k becomes k + 1, and pixels without a class become class 0; otherwise these are all zeros.
    segmentation_to_float32: float32, as in the published configs; otherwise uint8, in a quarter of the memory, which
    models convert. Other parameters as in ImageFolder.
    """

    def __init__(
        self,
        root: PathText | None = None,
        segmentation_root: PathText | None = None,
        size: Size | None = 256,
        n_labels: int = 182,
        shift_segmentation: bool = False,
        segmentation_to_float32: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(n_labels, int) or not 1 <= n_labels <= UNLABELED:
            raise DataConfigError("n_labels", n_labels, "not a number of classes", f"set {{param}} to 1 .. {UNLABELED}")
        content = "maps, .png files with the names of the images"
        self.maps = existing_folder("segmentation_root", segmentation_root, content)
        self.n_labels, self.shift = n_labels, shift_segmentation
        self.dtype = np.float32 if segmentation_to_float32 else np.uint8
        self.image_root = expand_user(root or "")
        super().__init__(root, size, **options)

    def _views(self, image: Image.Image, view: View, index: int) -> dict[str, Any]:
        path = self._map(self.items[index].name)
        labels = self._labels(path, image)
        one_hot = np.eye(256, self.n_labels, dtype=self.dtype)  # row k: class k; rows past the last class are zeros
        return {
            self.image_key: to_array(view.apply(image, self.interpolation)),
            "segmentation": one_hot[np.asarray(view.apply(labels, "nearest"))],
            "segmentation_path_": str(path),
        }

    def _map(self, name: str) -> Path:
        return self.maps / (self.root / name).relative_to(self.image_root).with_suffix(".png")

    def _labels(self, path: Path, image: Image.Image) -> Image.Image:
        """Load a map with classes 0 .. n_labels - 1 and UNLABELED."""
        labels = load_labels(path, self.max_pixels)
        if labels.size != image.size:
            sizes = f"{labels.width}x{labels.height}, but its image is {image.width}x{image.height}"
            raise BadImageError(path, f"is {sizes}")
        numbers = np.asarray(labels)
        if self.shift:
            numbers = numbers + np.uint8(1)  # 255 becomes 0
        highest = int(np.where(numbers == UNLABELED, 0, numbers).max(initial=0))
        if highest >= self.n_labels:
            raise BadImageError(path, f"has class {highest}, but n_labels is {self.n_labels}")
        return Image.fromarray(numbers)

    def _check(self, name: str) -> None:
        self._labels(self._map(name), self._read(name))


class _RFW(
    Defaults,
    SegmentedImages,
    root="data/rfw/images",
    segmentation_root="data/rfw/segmentations",
    size=768,
    crop_size=512,
):
    pass


class RFWTrain(_RFW, split="train", random_crop=True):
    """Landscapes for training, random crops."""


class RFWValidation(_RFW, split="validation"):
    """Landscapes for validation, central crops."""
