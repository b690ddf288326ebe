"""Open Images: pictures, pairs for super-resolution, and pictures with their layout of bounding boxes. The published layout:

    data/openimages/train/*.jpg, data/openimages/validation/*.jpg    at any depth
    data/openimages/annotations/class-descriptions-boxable.csv       for layouts, as are the next two
    data/openimages/annotations/oidv6-train-annotations-bbox.csv
    data/openimages/annotations/validation-annotations-bbox.csv

The tables may also lie beside train/. `download: true` fetches them (the one for training has 2 GB); the pictures come from
https://storage.googleapis.com/openimages/web/download_v7.html.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data import image as pictures
from ldm.data.archives import Remote, fetch
from ldm.data.base import DataConfigError
from ldm.data.boxes import read_boxes, read_classes
from ldm.data.folder import ImageFolder
from ldm.data.image import Size, View
from ldm.data.superres import SuperResolution
from ldm.modules.encoders.layout_tokens import LayoutTokens, Region

logger = logging.getLogger(__name__)

ROOT = "data/openimages"
PUBLISHER = "https://storage.googleapis.com/openimages"
CLASSES = Remote(f"{PUBLISHER}/v5/class-descriptions-boxable.csv", "class-descriptions-boxable.csv")


class _Train(ImageFolder):
    """Pictures of Open Images' part for training; root is the folder that holds train/."""

    holding = "pictures, the train/ of Open Images: root is the folder above it"
    part = "train"
    table = Remote(f"{PUBLISHER}/v6/oidv6-train-annotations-bbox.csv", "oidv6-train-annotations-bbox.csv")

    def __init__(self, root: str = ROOT, **options: Any) -> None:
        super().__init__(str(Path(root) / self.part), **options)


class _Validation(_Train):
    """Pictures of Open Images' part for validation; root is the folder that holds validation/."""

    holding = "pictures, the validation/ of Open Images: root is the folder above it"
    part = "validation"
    table = Remote(f"{PUBLISHER}/v5/validation-annotations-bbox.csv", "validation-annotations-bbox.csv")


class FullOpenImagesTrain(_Train):
    """Pictures cut anywhere. size None cuts them as they are; parameters are those of ImageFolder."""

    def __init__(
        self, size: Size | None = None, crop_size: Size | None = 256, random_crop: bool = True, **options: Any
    ) -> None:
        super().__init__(size=size, crop_size=crop_size, random_crop=random_crop, **options)


class FullOpenImagesValidation(_Validation):
    """Pictures cut from the middle. size None cuts them as they are; parameters are those of ImageFolder."""

    def __init__(self, size: Size | None = None, crop_size: Size | None = 256, **options: Any) -> None:
        super().__init__(size=size, crop_size=crop_size, **options)


class SuperresOpenImagesAdvancedTrain(SuperResolution, _Train):
    """Pairs `image`, `LR_image`: parameters of SuperResolution."""


class SuperresOpenImagesAdvancedValidation(SuperResolution, _Validation):
    """Pairs `image`, `LR_image`: parameters of SuperResolution."""


class Layouts(ImageFolder):
    """Mixin: pictures with `coordinates_bbox`, the boxes of their objects as 92 tokens (see ldm.modules.encoders.layout_tokens), int64.

    object_classes: ids of the classes ("/m/011k07"), as a list or as a text file with one on each line; None is all boxable ones (601).
    min_object_area: smaller boxes, as a share of the picture, are left out. min_objects, max_objects: pictures with fewer or more boxes are
    left out. vocab_size: of the tokens. download: fetch the tables where they are missing. Other parameters are those of ImageFolder;
    pictures are scaled to cover size, so that the crop moves along their longer side.

    `conditional_builders` says how the tokens are read, `get_textual_label_for_category_no` what a class is called.
    """

    part: str
    table: Remote

    def __init__(
        self,
        size: Size = 256,
        object_classes: str | Sequence[str] | None = None,
        min_object_area: float = 0.0001,
        min_objects: int = 2,
        max_objects: int = 30,
        vocab_size: int = 8192,
        download: bool = False,
        root: str = ROOT,
        **options: Any,
    ) -> None:
        if options.get("class_labels"):
            raise DataConfigError("class_labels", True, "pictures with layouts have none", "take {param} out")
        super().__init__(size=size, root=root, **options)
        self.object_names = read_classes(_table(root, CLASSES), _chosen(object_classes))
        tokens = LayoutTokens(len(self.object_names), max_objects, vocab_size)
        self.conditional_builders = {"coordinates_bbox": tokens}
        numbers = {Path(item.name).stem: k for k, item in enumerate(self.items)}
        self.boxes = read_boxes(_table(root, self.table), numbers, list(self.object_names), min_object_area)
        counts = self.boxes.counts()
        self.rows = np.flatnonzero(
            (counts >= min_objects) & (counts <= max_objects)
        )  # of `boxes`, for each picture that is kept
        if not len(self.rows):
            raise DataConfigError(
                "min_objects", min_objects, f"no picture has {min_objects} to {max_objects} boxes", "lower {param}"
            )
        logger.info(
            "%s: %d of %d pictures have %d to %d boxes",
            self.root,
            len(self.rows),
            len(self.items),
            min_objects,
            max_objects,
        )
        self.items = [self.items[row] for row in self.rows]

    @classmethod
    def prepare_data(cls, root: str = ROOT, download: bool = False, **_: Any) -> None:
        """Fetch the tables where that is asked for."""
        for remote in (CLASSES, cls.table) if download else ():
            if _find(root, remote) is None:
                fetch(remote, Path(root).expanduser() / "annotations")

    def get_textual_label_for_category_no(self, number: int) -> str:
        """What a class is called: "Tortoise"."""
        return list(self.object_names.values())[number]

    def _values(self, picture: Image.Image, index: int) -> dict[str, Any]:
        view = self._view(picture)
        boxes = self.boxes.of(self.rows[index])
        random.shuffle(boxes)
        tokens = self.conditional_builders["coordinates_bbox"].encode(boxes, _region(view), view.mirrored)
        return {self.image_key: pictures.to_array(view.of(picture, self.interpolation)), "coordinates_bbox": tokens}


class OpenImagesBBoxTrain(Layouts, _Train):
    """Pictures with layouts, cut anywhere along their longer side and mirrored at random."""

    def __init__(self, random_crop: bool = True, flip_p: float = 0.5, **options: Any) -> None:
        super().__init__(random_crop=random_crop, flip_p=flip_p, **options)


class OpenImagesBBoxValidation(Layouts, _Validation):
    """Pictures with layouts, cut from the middle."""


def _region(view: View) -> Region:
    """What is seen of the picture, as shares of it."""
    width, height = view.scaled
    left, top, right, bottom = view.box
    return left / width, top / height, (right - left) / width, (bottom - top) / height


def _find(root: str, remote: Remote) -> Path | None:
    folder = Path(root).expanduser()
    return next((path for path in (folder / "annotations" / remote.name, folder / remote.name) if path.is_file()), None)


def _table(root: str, remote: Remote) -> Path:
    found = _find(root, remote)
    if found is None:
        advice = f"get it from {remote.url}, set download to true, or set {{param}} to the folder that holds it"
        raise DataConfigError("root", root, f"holds no annotations/{remote.name}", advice)
    return found


def _chosen(object_classes: str | Sequence[str] | None) -> list[str] | None:
    if not isinstance(object_classes, str):
        return None if object_classes is None else list(object_classes)
    path = Path(object_classes).expanduser()
    if not path.is_file():
        raise DataConfigError(
            "object_classes", object_classes, "no such file", "set {param} to a file with one class id on each line"
        )
    return path.read_text(encoding="utf-8").split()
