"""Open Images: images, super-resolution pairs, and images with bounding-box layouts. The published layout:

    data/openimages/train/*.jpg, data/openimages/validation/*.jpg    at any depth
    data/openimages/annotations/class-descriptions-boxable.csv       this and the next two for layouts only
    data/openimages/annotations/oidv6-train-annotations-bbox.csv
    data/openimages/annotations/validation-annotations-bbox.csv

The tables may also be next to train/. `download: true` downloads them (the training table has 2 GB); the images are at
https://storage.googleapis.com/openimages/web/download_v7.html.
"""

from __future__ import annotations

import csv
import logging
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.config.types import PathText
from ldm.data.archives import Remote, fetch
from ldm.data.base import DataConfigError
from ldm.data.folder import Defaults, ImageFolder
from ldm.data.image import Size, View, to_array
from ldm.data.listing import read_lines
from ldm.data.superres import SuperResolution
from ldm.modules.encoders.layout_tokens import Box, LayoutTokens, Region
from ldm.paths import expand_user

logger = logging.getLogger(__name__)

ROOT = "data/openimages"
PUBLISHER = "https://storage.googleapis.com/openimages"
CLASSES = Remote(f"{PUBLISHER}/v5/class-descriptions-boxable.csv", "class-descriptions-boxable.csv")
LAST_CLASS = "/m/01s55n"  # suitcases come last in taming-transformers' numbering of the classes
COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf")
TABLES_ADVICE = "set {param} to a folder with Open Images' tables"


@dataclass(frozen=True)
class BoxTable:
    """The boxes of N images; those of image i are rows starts[i] .. starts[i + 1] - 1."""

    starts: np.ndarray  # (N + 1,) int64
    categories: np.ndarray  # (M,) int64
    regions: np.ndarray  # (M, 4) float32: x, y, width, height, relative to the image
    groups: np.ndarray  # (M,) bool: the box holds a group of objects

    def of(self, image: int) -> list[Box]:
        """Return the boxes of one image."""
        rows = slice(self.starts[image], self.starts[image + 1])
        found = zip(self.categories[rows].tolist(), self.regions[rows].tolist(), self.groups[rows].tolist())
        return [Box(category, (x, y, width, height), group) for category, (x, y, width, height), group in found]


def read_classes(file: Path, chosen: Sequence[str] | None = None) -> dict[str, str]:
    """Return {class id ("/m/011k07"): name} of all classes in a table, or of `chosen`, in the order of their numbers.

    They are sorted, except for LAST_CLASS, as in taming-transformers' layouts of Open Images.
    """
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, quoting=csv.QUOTE_NONE)  # a stray quote swallows no rows
        names = {row[0]: ",".join(row[1:]).strip('"') for row in rows if len(row) >= 2 and row[0] != "LabelName"}
    if unknown := [name for name in chosen or () if name not in names]:
        advice = "set {param} to ids in that file, such as /m/011k07"
        raise DataConfigError("object_classes", list(chosen or ()), f"{file} has no {unknown[0]}", advice)
    ids = sorted(names if chosen is None else set(chosen), key=lambda name: (name == LAST_CLASS, name))
    if not ids:
        raise DataConfigError("root", str(file), "has no classes", TABLES_ADVICE)
    return {name: names[name] for name in ids}


def read_boxes(file: Path, images: Mapping[str, int], classes: Sequence[str], min_area: float = 0.0) -> BoxTable:
    """Return the boxes of `images` (id -> 0 .. N - 1) and `classes` with a relative area of at least `min_area`."""
    number = {name: k for k, name in enumerate(classes)}
    owners, categories, regions, groups = array("q"), array("q"), array("f"), array("b")
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, quoting=csv.QUOTE_NONE)
        header = next(reader, [])
        if missing := [name for name in COLUMNS if name not in header]:
            raise DataConfigError("root", str(file), f"has no column {missing[0]}", TABLES_ADVICE)
        owner, label, *edges, group = (header.index(name) for name in COLUMNS)
        try:
            for row in reader:
                image, category = images.get(row[owner]), number.get(row[label])
                if image is None or category is None:
                    continue
                x0, x1, y0, y1 = (min(max(float(row[k]), 0.0), 1.0) for k in edges)
                if x1 > x0 and y1 > y0 and (x1 - x0) * (y1 - y0) >= min_area:
                    owners.append(image)
                    categories.append(category)
                    regions.extend((x0, y0, x1 - x0, y1 - y0))
                    groups.append(row[group] == "1")
        except (ValueError, IndexError, csv.Error) as error:
            line = f"{file} line {reader.line_num}"
            raise DataConfigError("root", line, f"unreadable ({error})", "download it again") from error
    owned = np.array(owners, dtype=np.int64)
    order = np.argsort(owned, kind="stable")
    counts = np.bincount(owned, minlength=max(images.values(), default=-1) + 1)
    return BoxTable(
        np.concatenate([[0], np.cumsum(counts)]),
        np.array(categories, dtype=np.int64)[order],
        np.array(regions, dtype=np.float32).reshape(-1, 4)[order],
        np.array(groups, dtype=bool)[order],
    )


class _Train(ImageFolder):
    """The training images; root is the folder that holds train/."""

    content = "images: the train/ of Open Images, with root the folder above it"
    part = "train"
    table = Remote(f"{PUBLISHER}/v6/oidv6-train-annotations-bbox.csv", "oidv6-train-annotations-bbox.csv")

    def __init__(self, root: str = ROOT, **options: Any) -> None:
        super().__init__(str(Path(root) / self.part), **options)


class _Validation(_Train):
    """The validation images; root is the folder that holds validation/."""

    content = "images: the validation/ of Open Images, with root the folder above it"
    part = "validation"
    table = Remote(f"{PUBLISHER}/v5/validation-annotations-bbox.csv", "validation-annotations-bbox.csv")


class FullOpenImagesTrain(Defaults, _Train, size=None, crop_size=256, random_crop=True):
    """Random crops; size None crops without scaling. Parameters as in ImageFolder."""


class FullOpenImagesValidation(Defaults, _Validation, size=None, crop_size=256):
    """Central crops; size None crops without scaling. Parameters as in ImageFolder."""


class SuperresOpenImagesAdvancedTrain(SuperResolution, _Train):
    """Pairs `image`, `LR_image`. Parameters as in SuperResolution."""


class SuperresOpenImagesAdvancedValidation(SuperResolution, _Validation):
    """Pairs `image`, `LR_image`. Parameters as in SuperResolution."""


class Layouts(ImageFolder):
    """Mixin: images with `coordinates_bbox`, their boxes as 92 int64 tokens (ldm.modules.encoders.layout_tokens).

    object_classes: class ids ("/m/011k07"), a list or a text file with one on each line; None: all 601 boxable ones.
    min_object_area: minimum area of a box, relative to the image.
    min_objects, max_objects: images with fewer or more boxes are left out.
    vocab_size: number of tokens. download: download missing tables.
    Other parameters as in ImageFolder; images are scaled to cover `size`, so the crop moves along the longer side.

    `conditional_builders` decodes the tokens, `get_textual_label_for_category_no` names a class.
    """

    part: str
    table: Remote

    def __init__(
        self,
        size: Size = 256,
        object_classes: PathText | Sequence[str] | None = None,
        min_object_area: float = 0.0001,
        min_objects: int = 2,
        max_objects: int = 30,
        vocab_size: int = 8192,
        download: bool = False,
        root: PathText = ROOT,
        **options: Any,
    ) -> None:
        if options.get("class_labels"):
            raise DataConfigError("class_labels", True, "not supported with layouts", "remove {param}")
        super().__init__(size=size, root=root, **options)
        self.object_names = read_classes(_table(root, CLASSES), _chosen(object_classes))
        tokens = LayoutTokens(len(self.object_names), max_objects, vocab_size)
        self.conditional_builders = {"coordinates_bbox": tokens}
        numbers = {Path(item.name).stem: k for k, item in enumerate(self.items)}
        if len(numbers) < len(self.items):
            repeated = next(item.name for k, item in enumerate(self.items) if numbers[Path(item.name).stem] != k)
            raise DataConfigError("root", root, f"has two images with the id of {repeated}", "remove one of them")
        self.boxes = read_boxes(_table(root, self.table), numbers, list(self.object_names), min_object_area)
        counts, bounds = np.diff(self.boxes.starts), f"{min_objects} to {max_objects} boxes"
        self.rows = np.flatnonzero((counts >= min_objects) & (counts <= max_objects))  # in `boxes`, of each kept image
        if not len(self.rows):
            raise DataConfigError("min_objects", min_objects, f"no image has {bounds}", "lower {param}")
        logger.info("%s: %d of %d images have %s", self.root, len(self.rows), len(self.items), bounds)
        self.items = [self.items[row] for row in self.rows]

    @classmethod
    def prepare_data(cls, root: str = ROOT, download: bool = False, **_: Any) -> None:
        """Download the tables if requested."""
        for remote in (CLASSES, cls.table) if download else ():
            if _find(root, remote) is None:
                fetch(remote, expand_user(root) / "annotations")

    def get_textual_label_for_category_no(self, number: int) -> str:
        """Return the name of a class, e.g. "Tortoise"."""
        return list(self.object_names.values())[number]

    def _views(self, image: Image.Image, view: View, index: int) -> dict[str, Any]:
        boxes = self.boxes.of(self.rows[index])
        random.shuffle(boxes)
        tokens = self.conditional_builders["coordinates_bbox"].encode(boxes, _region(view), view.mirrored)
        return {self.image_key: to_array(view.apply(image, self.interpolation)), "coordinates_bbox": tokens}


class OpenImagesBBoxTrain(Defaults, Layouts, _Train, random_crop=True, flip_p=0.5):
    """Images with layouts, random crops along the longer side, randomly flipped."""


class OpenImagesBBoxValidation(Layouts, _Validation):
    """Images with layouts, central crops."""


def _region(view: View) -> Region:
    """Return the crop relative to the scaled image."""
    width, height = view.scaled
    left, top, right, bottom = view.box
    return left / width, top / height, (right - left) / width, (bottom - top) / height


def _find(root: str, remote: Remote) -> Path | None:
    folder = expand_user(root)
    return next((path for path in (folder / "annotations" / remote.name, folder / remote.name) if path.is_file()), None)


def _table(root: str, remote: Remote) -> Path:
    if found := _find(root, remote):
        return found
    advice = f"get it from {remote.url}, set download to true, or set {{param}} to the folder that holds it"
    raise DataConfigError("root", root, f"has no annotations/{remote.name}", advice)


def _chosen(object_classes: PathText | Sequence[str] | None) -> list[str] | None:
    if not isinstance(object_classes, str):
        return None if object_classes is None else list(object_classes)
    return read_lines("object_classes", object_classes, "a file with one class id on each line")
