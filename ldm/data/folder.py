"""Image folders as datasets, with captions or class labels."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.cli import counted
from ldm.config.consistency import LOSS_MASK
from ldm.config.types import PathText
from ldm.data.base import DataConfigError, check_choice
from ldm.data.captions import (
    COLUMNS,
    SIDECAR,
    TABLES,
    Row,
    read_sidecar,
    read_table,
    usual_table,
)
from ldm.data.image import EXTENSIONS, BadImageError, Size, load_image, load_like
from ldm.data.image_dataset import ImageDataset, digest
from ldm.data.listing import FileNames, NamedAlike, existing_folder, read_list, scan
from ldm.data.order import usable_cpus
from ldm.data.splits import (
    FORCE,
    SPLITS,
    SplitFolder,
    check_folders,
    class_of,
    class_order,
    listed_classes,
    names_of_split,
    split_folder,
    split_of,
)
from ldm.paths import expand_user

logger = logging.getLogger(__name__)

_HASHED = 16  # images, at most, whose content is in the fingerprint
_THREADS = 16  # for the sizes of files, which a network file system takes long for


class Item(NamedTuple):
    """An image: its path below the root, and its captions (none if the dataset has none)."""

    name: str
    captions: tuple[str, ...] = ()


class ImageFolder(ImageDataset):
    """Images below a folder, at any depth, sorted by name; sizes, crops, captions and errors as in ImageDataset.

    With class labels an item also holds `class_label` (int64 in a batch) and `human_label`.

    root: the folder. files: a text file that lists the images, one path below root on each line, instead of a split.

    captions: None; "sidecar" (cat.txt next to cat.jpg, one caption per line); or a .csv, .tsv or .jsonl table, which
    then also selects the images (paths relative to root, or to the folder of the split; a column `split` with the names
    of splits selects too). image_column, caption_column: its columns; None takes the first match of file_name,
    filename, file, image, image_path, path, and of text, caption, captions, prompt, txt. An image may have several
    captions (lines, records, a JSON list). caption_encoding: if not UTF-8.

    class_labels: number the folders directly below root, or below the folder of the training split, sorted by name.
    classes: another order, as a list of names, as a .txt file with one on each line, or as a folder of class folders.

    split: "train", "validation" or "test" is the sub-folder of root that is named like it (ldm.data.splits.SPLITS). If
    there is none for validation, a validation_fraction of the training images, chosen by a hash of their names, is for
    validation. None uses all of root, which then has no such sub-folders. No class is made of a folder that is named
    like a split, unless `classes` lists it.

    masks: a folder of masks, named as the images are (`a/cat.png` for `a/cat.jpg`), for the `loss_mask_key` of a model.
    An item then holds `loss_mask` float32 (H, W, 1) in [0, 1], 1 where the mask is white, in the view of the image.

    on_error: skip decodes every image once when the dataset is built, leaves out the unusable ones and logs their
    number; `skipped` lists the reasons.
    """

    content = "images"  # of the folder, for error messages
    suffixes = EXTENSIONS
    columns = COLUMNS  # of a captions table
    paired_column: str | None = None

    def __init__(
        self,
        root: PathText | None = None,
        size: Size | None = 256,
        files: PathText | None = None,
        captions: PathText | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        caption_encoding: str = "utf-8",
        class_labels: bool = False,
        classes: PathText | Sequence[str] | None = None,
        split: str | None = None,
        validation_fraction: float = 0.05,
        masks: PathText | None = None,
        **options: Any,
    ) -> None:
        self.captioned, self.caption_encoding = captions is not None, caption_encoding
        super().__init__(size, **options)
        check_choice("split", split, (None, *SPLITS))
        self.paired: dict[str, str] = {}  # name -> that of its second image, of tables that pair images

        self.whole = whole = existing_folder("root", root, self.content)
        declared = listed_classes(classes) or ()
        place = split_folder(whole, split, declared) if files is None else SplitFolder(whole)
        self.root, self.split = place.path, split
        self.masks = None if masks is None else NamedAlike("masks", masks, self.root, whole)
        table = _table(captions, (self.root, whole))
        texts = None
        rows: list[Row] = []
        if table is not None:
            rows = self._rows(table, image_column, caption_column)
            texts, place = self._table_captions(table, rows, whole, place)
        if files is not None:
            if split is not None and not any(row.split for row in rows):
                advice = "set {param} to null, with a list for each split"
                raise DataConfigError("split", split, f"selects nothing from the list {files}", advice)
            listed = self._listed(files)  # {name: None}, ordered
            names = [name for name in texts if name in listed] if texts is not None else list(listed)
        else:
            names = list(texts) if texts is not None else scan(self.root, self.suffixes)
            check_folders(names, self.root, split, class_labels, declared)
        self.class_names = None
        if class_labels:
            if place.unused and any(not class_of(name) for name in names):
                beside = ", ".join(place.unused[:5])
                problem = f"holds {self.root.name}/, which has no class folders, beside {beside}"
                raise DataConfigError("root", str(whole), problem, FORCE)
            self.class_names = class_order(names, classes, scan(place.train, self.suffixes) if place.train else None)
            check_folders([f"{name}/" for name in self.class_names], self.root, None, True, declared)
        found = len(names)
        if place.shared:
            names = names_of_split(names, split, validation_fraction, class_labels)
        items = [item for name in names if (item := self._item(name, texts)) is not None]
        self.items = self._readable(items) if self.on_error == "skip" else items
        numbers = {name: i for i, name in enumerate(self.class_names or ())}
        self.labels = [numbers[class_of(item.name)] for item in self.items] if class_labels else None
        if not self.items:
            problem = "no images in it" + (f" that {table} names" if table is not None else "")
            problem += f" for split {split}" if split else ""
            if self.skipped:
                first = ": ".join(next(iter(self.skipped.items())))
                problem += f" can be used: {len(self.skipped)} skipped, first {first}"
            raise DataConfigError("root", str(self.root), problem, f"set {{param}} to a folder of {self.content}")
        self._report(place, table, found)

    def __len__(self) -> int:
        return len(self.items)

    def _load(self, index: int) -> Image.Image:
        return self._read(self.items[index].name)

    def _values(self, image: Image.Image, index: int) -> dict[str, Any]:
        if self.masks is None:
            return super()._values(image, index)
        view, mask = self._view(image, index), self._read_mask(self.items[index].name, image)
        levels = np.asarray(view.apply(mask, "bilinear"), dtype=np.float32)
        return {**self._views(image, view, index), **self._geometry(image, view), LOSS_MASK: levels[..., None] / 255}

    def _read_mask(self, name: str, image: Image.Image) -> Image.Image:
        assert self.masks is not None
        (path,) = self.masks.of(name)
        mask = load_like(path, image, self.max_pixels).convert("L")
        if mask.getextrema()[1] == 1:
            raise BadImageError(path, "its largest value is 1 of 255, nearly black: save masks with 255 for white")
        return mask

    def _captions(self, index: int) -> Sequence[str]:
        return self.items[index].captions

    def _sample(self, index: int) -> dict[str, Any]:
        sample = super()._sample(index)
        if self.labels is not None and self.class_names is not None:
            sample |= {"class_label": self.labels[index], "human_label": self.class_names[self.labels[index]]}
        return sample

    @cached_property
    def fingerprint(self) -> dict[str, int | str]:
        """Hashes of the images' names in their order, of their captions and class names, and of their content.

        The content is that of some images and of the files that belong to them, and the sizes in bytes of all.
        """
        labels: list[object] = [[item.captions for item in self.items], self.labels, self.class_names]
        labels += [self.prompts.templates, self.prompts.subject] if self.prompts else []
        if pairs := self._pairs():
            labels.append(pairs)
        if self.masks is not None:
            labels.append([self.masks.of(item.name)[0].name for item in self.items])
        files = digest([item.name for item in self.items])
        with ThreadPoolExecutor(_THREADS) as pool:
            content: list[object] = [*pool.map(self._bytes, range(_THREADS))]
        some = range(0, len(self), len(self) // _HASHED + 1)
        content += [_hash_of(path) for index in some for path in self._files(index)]
        return {"files": files, "labels": digest(labels), "content": digest(content), **self.bucket_fingerprint}

    def _bytes(self, first: int) -> list[int]:
        """Return the sizes in bytes of the files of every _THREADS-th image."""
        return [_bytes_of(path) for index in range(first, len(self), _THREADS) for path in self._files(index)]

    def _files(self, index: int) -> list[Path]:
        """Return the file of a sample and those that belong to it."""
        name = self.items[index].name
        masks = [] if self.masks is None else self.masks.of(name)
        paired = self.paired_file(name) if self.paired.get(name) else None
        return [self.file_of(index), *masks, *([] if paired is None else [paired])]

    def _pairs(self) -> list[str]:
        """Return the names of the files that belong to the images, in their order; empty if there are none."""
        return [self.paired[item.name] for item in self.items] if any(self.paired.values()) else []

    def file_of(self, index: int) -> Path:
        """Return the file of a sample."""
        return self.root / self.items[index].name

    def _read(self, name: str) -> Image.Image:
        path = self.root / name
        image = load_image(path, self.max_pixels)
        self._check_size(path, *image.size)
        return image

    def _check(self, name: str) -> None:
        """Raise BadImageError if the image is unusable."""
        self._read(name)

    def _listed(self, files: str) -> dict[str, None]:
        """Return the existing images of a list, each once."""
        on_disk, names = FileNames(self.root), dict.fromkeys(read_list(files, self.root, self.suffixes))
        found = {name: on_disk.find(name) for name in names}
        for name in (name for name, existing in found.items() if existing is None):
            self._unusable(f"{files}: {name}", f"no such file: {self.root / name}")
        return dict.fromkeys(name for name in found.values() if name is not None)

    def _rows(self, table: Path, image_column: str | None, caption_column: str | None) -> list[Row]:
        """Return the records of a captions table; raise DataConfigError if it cannot be read or has none."""
        try:
            own = self.caption_encoding, self.suffixes, self.columns, self.paired_column
            rows = list(read_table(table, image_column, caption_column, *own))
        except DataConfigError:
            raise
        except (OSError, ValueError) as error:
            raise DataConfigError("captions", str(table), str(error), "set {param} to a readable table") from error
        if not rows:
            raise DataConfigError("captions", str(table), "has no rows", "add a header and a row for each image")
        return rows

    def _table_captions(
        self, table: Path, rows: list[Row], whole: Path, place: SplitFolder
    ) -> tuple[dict[str, list[str]], SplitFolder]:
        """Return {image: captions} of this split in the order of the table, and `place`, shared as the table says.

        A table names images relative to `whole`, or relative to the folder of the split, and may name their splits.
        """
        own_rows: str | None = None
        if named := {row.split for row in rows} - {None}:
            place = place._replace(shared="validation" not in named and self.split not in (None, "test"))
            own_rows = "train" if place.shared else self.split
            if own_rows not in named:
                problem = f"{table} has the splits {', '.join(sorted(map(str, named)))} in its column 'split'"
                raise DataConfigError("split", self.split, problem, "set {param} to one of them")
        on_disk, prefix = FileNames(self.root), f"{self.root.name}/" if self.root != whole else ""
        texts: dict[str, dict[str, None]] = {}
        repeated = elsewhere = 0
        for row in rows:
            problem = self._problem_of(row, bool(named), (*place.others, prefix[:-1]))
            if not problem and (row.split != own_rows or row.image.partition("/")[0] in place.others):
                elsewhere += 1
                continue
            name = None if problem else on_disk.find(row.image.removeprefix(prefix)) or on_disk.find(row.image)
            if name is None and not problem and prefix and os.path.isfile(whole / row.image):
                elsewhere += 1  # beside the folders of the splits
                continue
            if name is not None and self.paired.setdefault(name, row.paired) != row.paired:
                name, problem = None, f"{row.image} is paired with another image in an earlier line"
            if name is None:
                self._unusable(f"{table} line {row.line}", problem or f"no such file: {whole / row.image}")
                continue
            self._use_row(name, row)
            known = texts.setdefault(name, {})
            repeated += sum(caption in known for caption in row.captions)
            known.update(dict.fromkeys(row.captions))
        for count, what in ((repeated, "repeat a caption of their image"), (elsewhere, "are not of this split")):
            if count:
                logger.info("%s: %d rows %s", table, count, what)
        return {name: list(captions) for name, captions in texts.items()}, place

    def _use_row(self, name: str, row: Row) -> None:
        """Keep what a subclass needs of the record of an image."""

    def paired_file(self, name: str) -> Path | None:
        """Return the file that the table pairs with an image; its path is relative to the split's folder or to root."""
        folders = (self.root, self.whole)
        return next((folder / file for folder in folders if (file := FileNames(folder).find(self.paired[name]))), None)

    def _problem_of(self, row: Row, splits_named: bool, folders: Sequence[str]) -> str:
        """Return why a record cannot be used; empty if it can. folders: those that hold splits."""
        if row.problem:
            return row.problem
        if splits_named and row.split is None:
            return "names no split in its column 'split'"
        for name in filter(None, (row.image, row.paired)):
            if Path(name).suffix.lower() not in self.suffixes:
                return f"{name!r} is not an image"
        folder = row.image.partition("/")[0]
        if row.split and folder in folders and split_of(folder) != row.split:
            return f"its column 'split' says {row.split}, but {row.image} is in {folder}/"
        return ""

    def _item(self, name: str, texts: dict[str, list[str]] | None) -> Item | None:
        """Return an image with its captions; None if the policies skip it."""
        if self.masks is not None and (problem := self.masks.problem(name)):
            self._unusable(name, problem)
            return None
        if not self.captioned:
            return Item(name)
        if texts is not None:
            found, why_missing = texts[name], "its caption in the table is blank"
        else:
            sidecar = (self.root / name).with_suffix(".txt")
            why_missing = f"no text in {sidecar}"
            if table := usual_table(self.whole):
                why_missing += f"; the table {table} is read with captions={table}"
            try:
                found = read_sidecar(sidecar, self.caption_encoding) if sidecar.is_file() else []
            except DataConfigError:
                raise
            except (OSError, ValueError) as error:
                self._unusable(str(sidecar), str(error))
                return None
        captions, reason = self.caption_policy.apply(name, found, why_missing)
        if reason:
            self.skipped[name] = reason
        return None if reason else Item(name, captions)

    def _readable(self, items: list[Item]) -> list[Item]:
        """Return the items whose images can be decoded."""

        def problem(item: Item) -> str:
            try:
                self._check(item.name)
                if self.masks is not None:
                    self._read_mask(item.name, self._read(item.name))
            except BadImageError as error:
                return error.reason or str(error)
            return ""

        with ThreadPoolExecutor(usable_cpus()) as pool:  # decoders release the interpreter's lock
            checks = tqdm(pool.map(problem, items), "checking images", len(items), leave=False, delay=3, disable=None)
            problems = dict(zip((item.name for item in items), checks))
        self.skipped |= {name: reason for name, reason in problems.items() if reason}
        return [item for item in items if not problems[item.name]]

    def _report(self, place: SplitFolder, table: Path | None, found: int) -> None:
        """Log the split, its size, captions and classes."""
        split = f", split {self.split}" + (f" of {found}" if place.shared else "") if self.split else ""
        captions = f", {counted(sum(len(item.captions) for item in self.items), 'caption')}" if self.captioned else ""
        captions += f" of {table}" if table is not None else ""
        classes = f", {counted(len(self.class_names), 'class', 'classes')}" if self.class_names is not None else ""
        logger.info("%s: %s%s%s%s", self.root, counted(len(self), "image"), split, captions, classes)
        if place.unused:
            logger.info("%s: not used, of no split: %s", self.root.parent, ", ".join(place.unused))
        if self.labels is not None and self.class_names is not None:
            present = set(self.labels)
            without = [name for number, name in enumerate(self.class_names) if number not in present]
            if without:
                some = ", ".join(without[:5])
                counts = len(without), len(self.class_names)
                logger.warning("%s: no images of %d of %d classes%s (%s)", self.root, *counts, split, some)
        if self.skipped:
            first = "; ".join(f"{what}: {reason}" for what, reason in list(self.skipped.items())[:3])
            skipped = len(self.skipped)
            total = len(self) + skipped
            logger.warning("%s: kept %d of %d, skipped %d (first: %s)", self.root, len(self), total, skipped, first)


class Defaults(ImageFolder):
    """Base of the published datasets: the keywords of a class statement are its default parameters."""

    defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **defaults: Any) -> None:
        super().__init_subclass__()
        cls.defaults = {**cls.defaults, **defaults}

    def __init__(self, root: PathText | None = None, **options: Any) -> None:
        options |= {} if root is None else {"root": root}
        super().__init__(**{**self.defaults, **options})


class ListedImages(Defaults):
    """Images of a folder that a list names; by default both at the published paths, relative to the working directory.

    files: the list, one path below root on each line. split: "train" and "validation" divide the folder by a hash of
    the names instead. Other parameters as in ImageFolder.
    """

    def __init__(
        self, size: Size = 256, files: PathText | None = None, split: str | None = None, **options: Any
    ) -> None:
        listed = (files or self.defaults["files"]) if split is None else None
        super().__init__(size=size, files=listed, split=split, **options)


def _bytes_of(path: Path) -> int:
    """Return the size of a file; -1 if it is missing."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _hash_of(path: Path) -> str:
    """Return a hash of the content of a file; "" if it cannot be read."""
    try:
        return digest(path.read_bytes())
    except OSError:
        return ""


def _table(captions: str | None, folders: Sequence[Path]) -> Path | None:
    """Find a captions table, in the folders or as given; return None for sidecars and without captions."""
    if captions is None or captions == SIDECAR:
        return None
    if Path(captions).suffix.lower() not in TABLES:
        advice = f"set {{param}} to {SIDECAR}, null, or a file of type {', '.join(TABLES)}"
        raise DataConfigError("captions", captions, "unknown", advice)
    found = next((path for folder in (*folders, Path()) if (path := folder / expand_user(captions)).is_file()), None)
    if found is None:
        problem = f"no such file, here or in {folders[-1]}"
        raise DataConfigError("captions", captions, problem, "set {param} to a captions table")
    return found
