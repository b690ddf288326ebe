"""Bounding boxes from Open Images' tables: millions of rows kept as arrays."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm.data.base import DataConfigError
from ldm.modules.encoders.layout_tokens import Box

LAST_CLASS = "/m/01s55n"  # suitcases stand at the end of the classes in taming-transformers' layouts
COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf")


@dataclass(frozen=True)
class BoxTable:
    """The boxes of N pictures: those of picture i are rows starts[i] .. starts[i + 1] - 1.

    starts: (N + 1,) int64; categories: (M,) int64; regions: (M, 4) float32, x, y, width and height as shares; groups: (M,) bool.
    """

    starts: np.ndarray
    categories: np.ndarray
    regions: np.ndarray
    groups: np.ndarray

    def counts(self) -> np.ndarray:
        """How many boxes each picture has -> (N,)."""
        return np.diff(self.starts)

    def of(self, picture: int) -> list[Box]:
        rows = range(self.starts[picture], self.starts[picture + 1])
        return [Box(int(self.categories[k]), tuple(self.regions[k].tolist()), bool(self.groups[k])) for k in rows]


def read_classes(file: Path, chosen: Sequence[str] | None = None) -> dict[str, str]:
    """Class ids ("/m/011k07") by number, with their names, of all classes in a table or of those chosen.

    Sorted, but for LAST_CLASS, as taming-transformers' layouts of Open Images number them.
    """
    with file.open(encoding="utf-8-sig", newline="") as lines:
        names = {row[0]: row[1] for row in csv.reader(lines) if len(row) >= 2 and row[0] != "LabelName"}
    if unknown := [name for name in chosen or () if name not in names]:
        raise DataConfigError(
            "object_classes", list(chosen), f"{file} has no {unknown[0]}", "set {param} to ids in it such as /m/011k07"
        )
    ids = sorted(names if chosen is None else set(chosen), key=lambda name: (name == LAST_CLASS, name))
    if not ids:
        raise DataConfigError("root", str(file), "holds no classes", "set {param} to a folder with Open Images' tables")
    return {name: names[name] for name in ids}


def read_boxes(file: Path, pictures: Mapping[str, int], classes: Sequence[str], min_area: float = 0.0) -> BoxTable:
    """The boxes of `pictures` (image id -> 0 .. N - 1) of these classes and of at least `min_area`, a share of the picture."""
    number = {name: k for k, name in enumerate(classes)}
    owners, categories, regions, groups = array("q"), array("q"), array("f"), array("b")
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines)
        header = next(reader, [])
        if missing := [name for name in COLUMNS if name not in header]:
            raise DataConfigError(
                "root", str(file), f"has no column {missing[0]}", "set {param} to a folder with Open Images' tables"
            )
        owner, label, *edges, group = (header.index(name) for name in COLUMNS)
        try:
            for row in reader:
                picture, category = pictures.get(row[owner]), number.get(row[label])
                if picture is None or category is None:
                    continue
                x0, x1, y0, y1 = (min(max(float(row[k]), 0.0), 1.0) for k in edges)
                if x1 > x0 and y1 > y0 and (x1 - x0) * (y1 - y0) >= min_area:
                    owners.append(picture)
                    categories.append(category)
                    regions.extend((x0, y0, x1 - x0, y1 - y0))
                    groups.append(row[group] == "1")
        except (ValueError, IndexError, csv.Error) as error:
            raise DataConfigError(
                "root", f"{file} line {reader.line_num}", f"unreadable ({error})", "fetch it again"
            ) from error
    order = np.argsort(np.array(owners, dtype=np.int64), kind="stable")
    counts = np.bincount(np.array(owners, dtype=np.int64), minlength=max(pictures.values(), default=-1) + 1)
    starts = np.concatenate([[0], np.cumsum(counts)])
    return BoxTable(
        starts,
        np.array(categories, dtype=np.int64)[order],
        np.array(regions, dtype=np.float32).reshape(-1, 4)[order],
        np.array(groups, dtype=bool)[order],
    )
