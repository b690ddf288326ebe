"""Splits and classes of an image folder, by the names of its folders. The only place that decides what a split is."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ldm.data.base import DataConfigError
from ldm.data.listing import existing_folder, is_hidden, read_lines

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
_WORDS = r"(data|data ?set|files|images?|imgs?|photos?|pics|pictures|samples|sets?|split|\d+)"
FORCE = "if it is a class, set classes to the list of all classes; otherwise rename it, or list the images in files"


class SplitFolder(NamedTuple):
    """The folder with the images of a split."""

    path: Path
    shared: bool = False  # by the splits: a fraction of its images is for validation, the others for training
    train: Path | None = None  # the folder of the training split, if another than `path`: it numbers the classes
    others: tuple[str, ...] = ()  # folders of other splits beside it
    unused: tuple[str, ...] = ()  # folders beside it that belong to no split


@cache
def split_of(folder: str) -> str | None:
    """Return the split that a folder is named like (see SPLITS; any case, perhaps with a year: train2017), or None."""
    name = re.sub(r"(19|20)\d\d$", "", folder.strip().casefold())
    return next((split for split, names in SPLITS.items() if name in names), None)


def _resembles_split(folder: str) -> bool:
    """Return True for names such as trainset, test_images and data-val, which are neither splits nor classes."""
    split = "|".join(name for names in SPLITS.values() for name in names)
    pattern = rf"({split})[\W_]*{_WORDS}|{_WORDS}[\W_]*({split})"
    return re.fullmatch(pattern, folder.strip().casefold()) is not None


def split_folder(root: Path, split: str | None, classes: Sequence[str] = ()) -> SplitFolder:
    """Return the folder of a split: a sub-folder named like it, else a share of root/train or of `root`.

    classes: names of folders that are classes, whatever they are named like.
    Raises DataConfigError where the folders do not tell which images are of the split.
    """
    found: dict[str, Path] = {}
    unused = []
    for path in sorted(path for path in root.iterdir() if path.is_dir() and not is_hidden(path.name)):
        name = split_of(path.name)
        if name is None or path.name in classes:
            unused.append(path.name)
            continue
        if name in found and not found[name].samefile(path):
            problem = f"{found[name].name}/ and {path.name}/ in it are both named like the {name} split"
            raise DataConfigError("root", str(root), problem, f"rename one of them; {FORCE}")
        found.setdefault(name, path)
    folders = " and ".join(f"{path.name}/" for path in found.values())
    if not found:
        if unclear := " and ".join(f"{name}/" for name in unused if name not in classes and _resembles_split(name)):
            problem = f"holds {unclear}, which may be a split, but is not named like one"
            advice = f"name splits {', '.join(SPLITS)}, or set {{param}} to one of these folders; {FORCE}"
            raise DataConfigError("root", str(root), problem, advice)
        return SplitFolder(root, shared=split is not None)
    if split is None:
        advice = f"set split to one of {', '.join(SPLITS)}, or {{param}} to one of these folders; {FORCE}"
        raise DataConfigError("root", str(root), f"holds {folders}, and split is not set", advice)
    shared = "validation" not in found and split != "test"
    own = "train" if shared else split
    if own in found:
        train = found.get("train") if own != "train" else None
        others = tuple(path.name for name, path in found.items() if name != own)
        return SplitFolder(found[own], shared, train, others, tuple(unused))
    problem = f"holds {folders}, but no folder of the {own} split ({', '.join(SPLITS[own])})"
    raise DataConfigError("root", str(root), problem, f"add it, or set {{param}} to a folder of one split; {FORCE}")


def check_folders(
    names: Iterable[str], root: Path, split: str | None, labelled: bool, classes: Sequence[str] = ()
) -> None:
    """Raise DataConfigError for a folder below `root` that is named like another split, and for such a class."""
    for folder in sorted({name.rpartition("/")[0] for name in names} - {""}):
        parts = folder.split("/")
        for depth, part in enumerate(parts):
            other = split_of(part)
            if other is None or part in classes or (other == split and not (labelled and depth == 0)):
                continue
            place = "/".join(parts[: depth + 1])
            above = (root / place).parent
            problem = f"{place}/ in it is named like the {other} split"
            raise DataConfigError("root", str(root), problem, f"set {{param}} to {above} with a split; {FORCE}")


def names_of_split(names: list[str], split: str | None, fraction: float, labelled: bool = False) -> list[str]:
    """Return the names of a split; the `fraction` with the smallest hashes (at least one name) is for validation.

    labelled: a class keeps at least one training image; if all would be for validation, all are for training.
    """
    if split == "test":
        advice = "set root to the folder that holds test/, or remove {param} to use all images"
        raise DataConfigError("split", split, "there is no folder test/ in root", advice)
    if split is None or (split == "train" and fraction == 0):
        return names
    if not 0 < fraction < 1:
        raise DataConfigError("validation_fraction", fraction, "leaves a split empty", "set {param} between 0 and 1")
    # By hash, not by position: when images are added, the others keep their split, but for a few at the border.
    ranked = sorted(names, key=lambda name: hashlib.blake2b(name.encode(errors="surrogateescape")).digest())
    count = min(len(ranked), max(1, round(fraction * len(ranked))))
    held_out = set(ranked[:count])
    if labelled:
        trained = {class_of(name) for name in ranked[count:]}
        held_out = {name for name in held_out if class_of(name) in trained}
    return [name for name in names if (name in held_out) == (split == "validation")]


def class_of(name: str) -> str:
    """Return the folder directly below the root that holds an image; "" if there is none."""
    return name.rpartition("/")[0].partition("/")[0]


def listed_classes(classes: str | Sequence[str] | None) -> list[str] | None:
    """Return class names by number from a list or a text file with one on each line; None for a folder and for None."""
    if isinstance(classes, str):
        if not classes.lower().endswith(".txt"):
            return None
        classes = read_lines("classes", classes, "a text file with one class on each line")
    if classes is None:
        return None
    order = [str(name) for name in classes]
    if len(set(order)) < len(order):
        repeated = next(name for name in order if order.count(name) > 1)
        raise DataConfigError("classes", order[:5], f"has {repeated!r} twice", "set {param} to different names")
    return order


def class_order(
    names: Sequence[str], classes: str | Sequence[str] | None, train_names: Sequence[str] | None = None
) -> list[str]:
    """Return the class names by number: `classes` (names, or a folder of classes), else the images' folders, sorted.

    names: the images, which must all be of these classes. train_names: images whose folders are the classes instead.
    """
    order = listed_classes(classes)
    if order is None and isinstance(classes, str):
        folder = existing_folder("classes", classes, "class folders, or to a list of names")
        order = sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
        check_folders([f"{name}/" for name in order], folder, None, labelled=True)
    if order is None:
        order = sorted({class_of(name) for name in (names if train_names is None else train_names)} - {""})
    if broken := next((name for name in order if len(name.splitlines()) > 1), None):  # files of classes have lines
        raise DataConfigError("classes", broken, "has a line end in its name", "rename its folder")
    known = set(order)
    stray = next((name for name in names if class_of(name) not in known), None)
    if stray is None:
        return order
    if not class_of(stray):
        problem = f"{stray} is not in a class folder"
        raise DataConfigError("class_labels", True, problem, "move it into one, or set {param} to false")
    composed = unicodedata.normalize("NFC", class_of(stray))
    if any(unicodedata.normalize("NFC", name) == composed for name in known):
        problem = f"{stray} is in a folder whose name is a class in another Unicode normal form (NFC, NFD)"
        raise DataConfigError("classes", order[:5], problem, "rename the folder, or the class in {param}")
    problem = f"{stray} is in none of these {len(order)} classes"
    raise DataConfigError("classes", order[:5], problem, "add its class to {param}, or remove it")
