"""ImageNet (ILSVRC 2012), as classes and as super-resolution pairs.

The published layout, with {split} being train or validation:

    root/ILSVRC2012_{split}/data/n01440764/n01440764_10026.JPEG
    root/ILSVRC2012_{split}/synset_human.txt      lines "n01440764 tench, Tinca tinca"; without it labels are synsets
    root/ILSVRC2012_{split}/ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar, unpacked if there is no data/ yet
    root/ILSVRC2012_validation/validation_synset.txt    lines "ILSVRC2012_val_00000001.JPEG n01751748", for unpacking

root may also hold train/ and val/ with the class folders, or be the folder of the class folders. Nothing is downloaded:
the data is available at image-net.org, under its terms.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from ldm.config.instantiate import accepted_params
from ldm.config.types import PathText
from ldm.data.archives import ArchiveError, unpack
from ldm.data.base import DataConfigError
from ldm.data.folder import ImageFolder
from ldm.data.listing import read_lines
from ldm.data.splits import split_of
from ldm.data.superres import SuperResolution
from ldm.paths import expand_user

HUMAN_LABELS = ("synset_human.txt", "LOC_synset_mapping.txt")


class ImageNetTrain(ImageFolder):
    """Training images with `class_label` (0..999, the synsets sorted), `human_label` and `synset`.

    root: see above; None means the published folder, $XDG_CACHE_HOME/autoencoders/data (in ~/.cache by default).
    config: the published way to give parameters, e.g. {size: 256}.
    Other parameters as in ImageFolder.
    """

    content = (
        "ImageNet (with ILSVRC2012_train/data/n01440764/*.JPEG etc., or ILSVRC2012_train/ILSVRC2012_img_train.tar)"
    )
    part, own_split, archive = "ILSVRC2012_train", "train", "ILSVRC2012_img_train.tar"

    def __init__(
        self,
        config: Annotated[Mapping[str, Any], "ldm.data.folder.ImageFolder"] | None = None,
        root: PathText | None = None,
        **options: Any,
    ) -> None:
        known, _ = accepted_params(type(self)) or ({}, set())
        for key, value in (config or {}).items():
            if key not in known:
                advice = f"choose from {', '.join(sorted(known))}"
                raise DataConfigError(f"config.{key}", value, "no such parameter", advice)
        options = {"class_labels": True, **(config or {}), **options}
        configured = options.pop("root", None)
        super().__init__(str(self._class_folders(_root(root or configured))), **options)
        self.human_labels = self._human_labels()

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        if "human_label" not in sample:
            return sample
        synset = sample["human_label"]
        return sample | {"synset": synset, "human_label": self.human_labels.get(synset, synset)}

    @classmethod
    def prepare_data(cls, root: str | None = None, config: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Unpack the archive if there is one and no data/ yet."""
        folder = _root(root or (config or {}).get("root")) / cls.part
        archive = folder / cls.archive
        if archive.is_file() and not (folder / "data").exists():
            cls._unpack(archive, folder / "data")

    @classmethod
    def _unpack(cls, archive: Path, folder: Path) -> None:
        unpack(archive, folder, nested=True)

    def _class_folders(self, root: Path) -> Path:
        inside = sorted(root.iterdir()) if root.is_dir() else []
        named = [folder for folder in inside if split_of(folder.name) == self.own_split]
        for folder in (root / self.part / "data", *named, root):
            if any(folder.glob("n[0-9]*/")):
                return folder
        problem = "has no class folders" if root.is_dir() else "no such folder"
        raise DataConfigError("root", str(root), problem, f"set {{param}} to a folder of {self.content}")

    def _human_labels(self) -> dict[str, str]:
        files = (folder / name for folder in (self.root, *self.root.parents[:2]) for name in HUMAN_LABELS)
        file = next((path for path in files if path.is_file()), None)
        return _read_pairs(file) if file is not None else {}


class ImageNetValidation(ImageNetTrain):
    """Validation images, as in ImageNetTrain."""

    part, own_split, archive = "ILSVRC2012_validation", "validation", "ILSVRC2012_img_val.tar"

    @classmethod
    def _unpack(cls, archive: Path, folder: Path) -> None:
        table = archive.parent / "validation_synset.txt"
        if not table.is_file():
            lines = "lines such as 'ILSVRC2012_val_00000001.JPEG n01751748'"
            raise ArchiveError(f"{archive}: unpacking needs validation_synset.txt next to it, with {lines}")
        synsets = _read_pairs(table)

        def rename(name: str) -> str:
            if name not in synsets:
                raise ArchiveError(f"{archive}: {table} has no line for {name}")
            return f"{synsets[name]}/{name}"

        unpack(archive, folder, rename=rename)


class ImageNetSRTrain(SuperResolution, ImageNetTrain):
    """Training pairs `image`, `LR_image`. Parameters as in SuperResolution, and root.

    The published runs used only the large images: list them in `files`, or set `min_size` and `on_error: skip`.
    """


class ImageNetSRValidation(SuperResolution, ImageNetValidation):
    """Validation pairs `image`, `LR_image`. Parameters as in SuperResolution, and root."""


def _read_pairs(file: Path) -> dict[str, str]:
    """Return {first word: rest} of each line of two words or more."""
    pairs = (line.split(maxsplit=1) for line in read_lines("root", str(file), "a folder with a readable one"))
    found: dict[str, str] = {}
    for first, rest in (pair for pair in pairs if len(pair) == 2):
        if found.setdefault(first, rest.strip()) != rest.strip():
            raise DataConfigError("root", str(file), f"has two lines {first!r}", "remove one of them")
    return found


def _root(root: str | None) -> Path:
    if root is not None:
        return expand_user(root)
    return expand_user(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "autoencoders/data"
