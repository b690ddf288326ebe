"""Pictures with a map of the class of every pixel; landscapes from Flickr, in this layout:

    data/rfw/images/            pictures, at any depth
    data/rfw/segmentations/     for images/a/b.jpg a map a/b.png: grey levels (or palette entries) 0..181 are the classes of COCO-Stuff,
                                255 is a pixel without a class

Either images/ holds train/ and validation/, or the pictures are divided by a hash of their names. The published model's data set was never
released; maps for pictures of one's own come from a segmentation network trained on COCO-Stuff.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data import image as pictures
from ldm.data.base import DataConfigError
from ldm.data.folder import ImageFolder
from ldm.data.image import BadImageError, Size
from ldm.data.listing import existing_folder

UNLABELED = 255


class SegmentedPictures(ImageFolder):
    """Pictures as `image`, and `segmentation` (H, W, n_labels): 1 at each pixel's class, else 0, cut as the picture is.

    root: the pictures. segmentation_root: the maps, .png files with the names of the pictures. n_labels: how many classes there are.
    shift_segmentation: class k stands at k + 1, and pixels without a class are class 0; else they have no class, all zeros.
    segmentation_to_float32: float32, as the published configs ask for; else uint8, which takes a quarter of the memory and which models
    turn to float themselves. Other parameters are those of ImageFolder.
    """

    def __init__(
        self,
        root: str | None = None,
        segmentation_root: str | None = None,
        size: Size | None = 256,
        n_labels: int = 182,
        shift_segmentation: bool = False,
        segmentation_to_float32: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(n_labels, int) or not 1 <= n_labels <= UNLABELED:
            raise DataConfigError("n_labels", n_labels, "no number of classes", f"set {{param}} to 1 .. {UNLABELED}")
        self.maps = existing_folder(
            "segmentation_root", segmentation_root, "maps, .png files with the names of the pictures"
        )
        self.n_labels, self.shift = n_labels, shift_segmentation
        self.dtype = np.float32 if segmentation_to_float32 else np.uint8
        self.whole = Path(root).expanduser() if root is not None else None
        super().__init__(root, size, **options)

    def _values(self, picture: Image.Image, index: int) -> dict[str, Any]:
        labels = self._labels(self._map(self.items[index].name), picture)
        view = self._view(picture)
        classes = np.asarray(view.of(labels, "nearest"))
        table = np.eye(256, self.n_labels, dtype=self.dtype)  # row k: class k alone; rows past the last class are zeros
        return {
            self.image_key: pictures.to_array(view.of(picture, self.interpolation)),
            "segmentation": table[classes],
            "segmentation_path_": str(self._map(self.items[index].name)),
        }

    def _map(self, name: str) -> Path:
        return self.maps / (self.root / name).relative_to(self.whole).with_suffix(".png")

    def _labels(self, path: Path, picture: Image.Image) -> Image.Image:
        """The map in a file, of classes 0 .. n_labels - 1 and UNLABELED."""
        labels = pictures.load_labels(path, self.max_pixels)
        if labels.size != picture.size:
            raise BadImageError(
                path, f"is {labels.width}x{labels.height}, its picture {picture.width}x{picture.height}"
            )
        numbers = np.asarray(labels)
        if self.shift:
            numbers = numbers + np.uint8(1)  # 255 becomes 0
        worst = int(np.where(numbers == UNLABELED, 0, numbers).max(initial=0))
        if worst >= self.n_labels:
            raise BadImageError(path, f"holds class {worst}, and n_labels is {self.n_labels}")
        return Image.fromarray(numbers)

    def _check(self, name: str) -> None:
        self._labels(self._map(name), self._read(name))


class RFWTrain(SegmentedPictures):
    """Landscapes for training, cut anywhere."""

    def __init__(
        self,
        size: Size | None = 768,
        crop_size: Size | None = 512,
        root: str = "data/rfw/images",
        segmentation_root: str = "data/rfw/segmentations",
        split: str | None = "train",
        random_crop: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            root, segmentation_root, size, crop_size=crop_size, split=split, random_crop=random_crop, **options
        )


class RFWValidation(SegmentedPictures):
    """Landscapes for validation, cut from the middle."""

    def __init__(
        self,
        size: Size | None = 768,
        crop_size: Size | None = 512,
        root: str = "data/rfw/images",
        segmentation_root: str = "data/rfw/segmentations",
        split: str | None = "validation",
        **options: Any,
    ) -> None:
        super().__init__(root, segmentation_root, size, crop_size=crop_size, split=split, **options)
