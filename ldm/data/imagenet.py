"""ImageNet (ILSVRC 2012), whole and as pairs for super-resolution.

The published layout, {split} being train or validation:

    root/ILSVRC2012_{split}/data/n01440764/n01440764_10026.JPEG
    root/ILSVRC2012_{split}/synset_human.txt      lines "n01440764 tench, Tinca tinca"; without it labels are the synsets
    root/ILSVRC2012_{split}/ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar, unpacked where there is no data/ yet
    root/ILSVRC2012_validation/validation_synset.txt    lines "ILSVRC2012_val_00000001.JPEG n01751748"; only to unpack

root may also hold train/ and val/ with the class folders, or be the folder that holds them. The data must be got from image-net.org,
under its terms: nothing is downloaded here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.config.instantiate import accepted_params
from ldm.data.archives import ArchiveError, unpack
from ldm.data.base import DataConfigError
from ldm.data.folder import ImageFolder
from ldm.data.superres import SuperResolution

HUMAN_LABELS = ("synset_human.txt", "LOC_synset_mapping.txt")


class _ImageNet(ImageFolder):
    """Pictures with `class_label` (0..999, the synsets sorted), `human_label` and `synset`.

    root: see above; None is the published place, $XDG_CACHE_HOME/autoencoders/data (~/.cache by default).
    Other parameters are those of ImageFolder.
    """

    holding = "ImageNet (with ILSVRC2012_train/data/n01440764/*.JPEG and so on, or with ILSVRC2012_img_train.tar in ILSVRC2012_train)"
    part, short_name, archive = "ILSVRC2012_train", "train", "ILSVRC2012_img_train.tar"

    def __init__(self, root: str | None = None, **options: Any) -> None:
        super().__init__(str(self._class_folders(root)), **{"class_labels": True, **options})
        self.human_labels = self._human_labels()

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        if self.labels is None:
            return sample
        synset = self.class_names[self.labels[index]]
        return sample | {"synset": synset, "human_label": self.human_labels.get(synset, synset)}

    @classmethod
    def prepare_data(cls, root: str | None = None, config: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Unpack the archive where it lies in its place and data/ is not there yet."""
        folder = _root(root or (config or {}).get("root")) / cls.part
        archive = folder / cls.archive
        if archive.is_file() and not (folder / "data").exists():
            cls._unpack(archive, folder / "data")

    @classmethod
    def _unpack(cls, archive: Path, folder: Path) -> None:
        unpack(archive, folder, nested=True)

    def _class_folders(self, root: str | None) -> Path:
        root = _root(root)
        places = (root / self.part / "data", root / self.short_name, root)
        found = next((place for place in places if place.is_dir() and any(place.glob("n[0-9]*/"))), None)
        if found is None:
            problem = "holds no class folders" if root.is_dir() else "no such folder"
            raise DataConfigError("root", str(root), problem, f"set {{param}} to a folder of {self.holding}")
        return found

    def _human_labels(self) -> dict[str, str]:
        files = (folder / name for folder in (self.root, *self.root.parents[:2]) for name in HUMAN_LABELS)
        file = next((path for path in files if path.is_file()), None)
        pairs = (
            (line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines())
            if file is not None
            else ()
        )
        return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


class _Validation(_ImageNet):
    part, short_name, archive = "ILSVRC2012_validation", "val", "ILSVRC2012_img_val.tar"

    @classmethod
    def _unpack(cls, archive: Path, folder: Path) -> None:
        table = archive.parent / "validation_synset.txt"
        if not table.is_file():
            line = "ILSVRC2012_val_00000001.JPEG n01751748"
            raise ArchiveError(
                f"{archive}: to unpack it, put validation_synset.txt beside it, with lines such as {line!r}"
            )
        synsets = dict(
            line.split()[:2] for line in table.read_text(encoding="utf-8").splitlines() if len(line.split()) >= 2
        )

        def place(name: str) -> str:
            if name not in synsets:
                raise ArchiveError(f"{archive}: {table} has no line for {name}")
            return f"{synsets[name]}/{name}"

        unpack(archive, folder, place=place)


class ImageNetTrain(_ImageNet):
    """Training pictures; `config` is the published way to give parameters, e.g. {size: 256}."""

    def __init__(self, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**_merged(config, options))


class ImageNetValidation(_Validation):
    """Validation pictures; `config` is the published way to give parameters, e.g. {size: 256}."""

    def __init__(self, config: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**_merged(config, options))


class ImageNetSRTrain(SuperResolution, _ImageNet):
    """Training pictures as pairs `image`, `LR_image`: parameters of SuperResolution, and root.

    The published runs took the large pictures alone, from a list: give one as `files`, or set `min_size` and `on_error: skip`.
    """


class ImageNetSRValidation(SuperResolution, _Validation):
    """Validation pictures as pairs `image`, `LR_image`: parameters of SuperResolution, and root."""


def _root(root: str | None) -> Path:
    if root is not None:
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "autoencoders/data"


def _merged(config: Mapping[str, Any] | None, options: Mapping[str, Any]) -> dict[str, Any]:
    known, _ = accepted_params(_ImageNet)
    for key in config or ():
        if key not in known:
            raise DataConfigError(
                f"config.{key}", config[key], "no such parameter", f"choose from {', '.join(sorted(known))}"
            )
    return {**(config or {}), **options}
