"""What a folder of pictures holds: its files, its splits and its classes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from ldm.data.base import DataConfigError
from ldm.data.image import EXTENSIONS

SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val", "valid")}


def existing_folder(param: str, value: str | None, holding: str) -> Path:
    """`value` as a folder that exists."""
    advice = f"set {{param}} to a folder of {holding}"
    if value is None:
        raise DataConfigError(param, value, "not set", advice)
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise DataConfigError(
            param, str(value), "is a file, not a folder" if folder.exists() else "no such folder", advice
        )
    return folder


def scan(root: Path, suffixes: Collection[str] = EXTENSIONS) -> list[str]:
    """Pictures below `root` by suffix, as sorted relative names with forward slashes; hidden files and folders are left out."""
    names, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up would never end
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "__MACOSX"]
        below = Path(folder).relative_to(root)
        names += [
            (below / name).as_posix()
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes
        ]
    return sorted(names)


def read_list(file: str, root: Path, suffixes: Collection[str] = EXTENSIONS) -> list[str]:
    """Pictures that a text file lists, one path below `root` on each line, in its order."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise DataConfigError(
            "files", str(file), "no such file", f"set {{param}} to a text file with one path below {root} on each line"
        )
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeError as error:
        raise DataConfigError(
            "files", str(file), f"no text in UTF-8 ({error})", "set {param} to a text file"
        ) from error
    for name in names:
        # A list may come from anywhere: it chooses among the pictures of the folder and reaches no other file.
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise DataConfigError(
                "files", str(file), f"its path {name!r} leaves {root}", "set {param} to a list of paths below it"
            )
        if Path(name).suffix.lower() not in suffixes:
            raise DataConfigError("files", str(file), f"{name!r} is no picture", "set {param} to a list of pictures")
    return names


def split_folder(root: Path, split: str | None) -> Path:
    """The sub-folder of a split ("train", "validation", "val" or "valid"), or the root where there is none."""
    return next((root / name for name in SPLIT_FOLDERS.get(split, ()) if (root / name).is_dir()), root)


def divided(root: Path) -> bool:
    """Whether the folder has sub-folders for training and for validation both."""
    return all(split_folder(root, split) != root for split in SPLIT_FOLDERS)


def part(names: Sequence[str], split: str | None, fraction: float) -> set[str]:
    """Names of a split: `fraction` of them (rounded, at least one) are for validation, those with the smallest hashes."""
    if split is None or (split == "train" and fraction == 0):
        return set(names)
    if not 0 < fraction < 1:
        raise DataConfigError(
            "validation_fraction", fraction, "nothing would be left for a split", "set {param} between 0 and 1"
        )
    # By hash and not by position: a picture keeps its split when others are added, but for a few at the border.
    ranked = sorted(names, key=lambda name: hashlib.blake2b(name.encode(errors="surrogateescape")).digest())
    count = min(len(ranked), max(1, round(fraction * len(ranked))))
    return set(ranked[:count] if split == "validation" else ranked[count:])


def class_of(name: str) -> str:
    """The folder directly below the root that a picture lies in; "" for none."""
    return name.partition("/")[0] if "/" in name else ""


def class_order(names: Sequence[str], classes: str | Sequence[str] | None) -> list[str]:
    """Class names by number: those of the pictures, sorted, or as `classes` (a list, or a folder of class folders) says."""
    if classes is None:
        order = sorted({class_of(name) for name in names} - {""})
    elif isinstance(classes, str):
        folder = existing_folder("classes", classes, "class folders, or to a list of names")
        order = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    else:
        order = [str(name) for name in classes]
    known = set(order)
    stray = next((name for name in names if class_of(name) not in known), None)
    if stray is not None:
        if not class_of(stray):
            raise DataConfigError(
                "class_labels", True, f"{stray} lies in no class folder", "move it into one, or set {param} to false"
            )
        problem = f"{stray} is in none of these {len(order)} classes"
        raise DataConfigError("classes", order[:5], problem, "add its class to {param}, or remove it")
    return order
