"""Files, splits and classes of an image folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from ldm.data.base import DataConfigError
from ldm.data.image import EXTENSIONS

SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val", "valid")}


def existing_folder(param: str, value: str | None, content: str) -> Path:
    """Return `value` as the path of an existing folder of `content`; raise DataConfigError otherwise."""
    advice = f"set {{param}} to a folder of {content}"
    if value is None:
        raise DataConfigError(param, value, "not set", advice)
    folder = Path(value).expanduser()
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "no such folder"
        raise DataConfigError(param, str(value), problem, advice)
    return folder


def scan(root: Path, suffixes: Collection[str] = EXTENSIONS) -> list[str]:
    """Return the images below `root`, hidden ones excepted, as sorted relative names with forward slashes."""
    names, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a parent folder
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "__MACOSX"]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes:
                names.append((Path(folder).relative_to(root) / name).as_posix())
    return sorted(names)


def read_list(file: str, root: Path, suffixes: Collection[str] = EXTENSIONS) -> list[str]:
    """Return the images listed in a text file, one path relative to `root` per line, in its order."""
    path = Path(file).expanduser()
    if not path.is_file():
        advice = f"set {{param}} to a text file with one path below {root} on each line"
        raise DataConfigError("files", str(file), "no such file", advice)
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeError as error:
        raise DataConfigError("files", str(file), f"not UTF-8 text ({error})", "set {param} to a text file") from error
    for name in names:
        if os.path.isabs(name) or ".." in Path(name).parts:  # an untrusted list may not reach other files
            problem = f"the path {name!r} leaves {root}"
            raise DataConfigError("files", str(file), problem, "set {param} to a list of paths below it")
        if Path(name).suffix.lower() not in suffixes:
            raise DataConfigError("files", str(file), f"{name!r} is not an image", "set {param} to a list of images")
    return names


def split_root(root: Path, split: str | None) -> Path:
    """Return the sub-folder of a split if `root` has sub-folders for both splits (SPLIT_FOLDERS), else `root`."""
    found = {name: [root / f for f in folders if (root / f).is_dir()] for name, folders in SPLIT_FOLDERS.items()}
    return found[split][0] if split is not None and all(found.values()) else root


def names_of_split(names: list[str], split: str | None, fraction: float) -> list[str]:
    """Return the names of a split; the `fraction` with the smallest hashes (at least one name) is for validation."""
    if split is None or (split == "train" and fraction == 0):
        return names
    if not 0 < fraction < 1:
        raise DataConfigError("validation_fraction", fraction, "leaves a split empty", "set {param} between 0 and 1")
    # By hash, not by position: when images are added, the others keep their split, but for a few at the border.
    ranked = sorted(names, key=lambda name: hashlib.blake2b(name.encode(errors="surrogateescape")).digest())
    count = min(len(ranked), max(1, round(fraction * len(ranked))))
    held_out = set(ranked[:count])
    return [name for name in names if (name in held_out) == (split == "validation")]


def class_of(name: str) -> str:
    """Return the folder directly below the root that holds an image; "" if there is none."""
    return name.rpartition("/")[0].partition("/")[0]


def class_order(names: Sequence[str], classes: str | Sequence[str] | None) -> list[str]:
    """Return the class names by number: those of the images, sorted, or `classes` (a list, or a folder of classes)."""
    if classes is None:
        order = sorted({class_of(name) for name in names} - {""})
    elif isinstance(classes, str):
        folder = existing_folder("classes", classes, "class folders, or to a list of names")
        order = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    else:
        order = [str(name) for name in classes]
    known = set(order)
    stray = next((name for name in names if class_of(name) not in known), None)
    if stray is None:
        return order
    if not class_of(stray):
        problem = f"{stray} is not in a class folder"
        raise DataConfigError("class_labels", True, problem, "move it into one, or set {param} to false")
    problem = f"{stray} is in none of these {len(order)} classes"
    raise DataConfigError("classes", order[:5], problem, "add its class to {param}, or remove it")
