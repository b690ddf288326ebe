"""Image folders as datasets, with captions or class labels."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data.base import DataConfigError, check_choice, check_probability
from ldm.data.captions import SIDECAR, TABLES, CaptionPolicy, read_sidecar, read_table
from ldm.data.image import (
    EXTENSIONS,
    MAX_PIXELS,
    RESAMPLING,
    BadImageError,
    Size,
    View,
    cover,
    crop_box,
    height_and_width,
    load_image,
    to_array,
)
from ldm.data.listing import (
    SPLIT_FOLDERS,
    class_of,
    class_order,
    existing_folder,
    names_of_split,
    read_list,
    scan,
    split_root,
)
from ldm.data.order import usable_cpus

logger = logging.getLogger(__name__)


class Item(NamedTuple):
    """An image: its path below the root, and its captions (none if the dataset has none)."""

    name: str
    captions: tuple[str, ...] = ()


class ImageFolder(Dataset):
    """Images below a folder, at any depth, sorted by name.

    An item holds `image` float32 (H, W, 3) in [-1, 1] and `file_path_`; with captions also `caption`, repeated as
    `txt`; with class labels also `class_label` (int64 in a batch) and `human_label`.

    root: the folder. files: a text file that lists the images, one path below root on each line, instead of a split.
    size: images are scaled, keeping their proportions, to cover this (a side, or [height, width]); None keeps images
    that cover crop_size at their own size. crop_size: the size of the crop (None means `size`), central or, with
    random_crop, at a random position.
    flip_p: probability of a horizontal flip. interpolation: bicubic, lanczos, bilinear, box or nearest; antialiased
    when shrinking.

    captions: None; "sidecar" (cat.txt next to cat.jpg, one caption per line); or a .csv, .tsv or .jsonl table, which
    then also selects the images (paths relative to root). image_column, caption_column: its columns; None takes the
    first match of file_name, filename, file, image, image_path, path, and of text, caption, captions, prompt, txt. An
    image may have several captions (lines, records, a JSON list): each sample takes a random one. caption_encoding: if
    not UTF-8. missing_caption (blank counts as missing): raise, skip the image, or use an empty caption. long_caption,
    for more than max_caption_chars: truncate (with one warning), raise or skip.

    class_labels: number the folders directly below root, sorted by name. classes: another order, as a list of names or
    as the folder that holds the class folders (for a validation folder that may lack some).

    split: None uses all of root. "train" and "validation" are the sub-folders of root with these names if both exist;
    otherwise a validation_fraction of the images, chosen by a hash of their names, is for validation and the rest for
    training.

    on_error: raise stops at the first unusable file. skip decodes every image once when the dataset is built, leaves
    out the unusable ones and logs their number; `skipped` lists the reasons. min_size: images with a shorter side below
    this are unusable (1x1 placeholders), and those above max_pixels. image_key, caption_key: names in the batch (Stable
    Diffusion's YAML uses jpg and txt).
    """

    content = "images"  # of the folder, for error messages
    suffixes = EXTENSIONS

    def __init__(
        self,
        root: str | None = None,
        size: Size | None = 256,
        crop_size: Size | None = None,
        random_crop: bool = False,
        flip_p: float = 0.0,
        interpolation: str = "bicubic",
        files: str | None = None,
        captions: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        caption_encoding: str = "utf-8",
        missing_caption: str = "raise",
        max_caption_chars: int = 4000,
        long_caption: str = "truncate",
        class_labels: bool = False,
        classes: str | Sequence[str] | None = None,
        split: str | None = None,
        validation_fraction: float = 0.05,
        on_error: str = "raise",
        min_size: int = 2,
        max_pixels: int = MAX_PIXELS,
        image_key: str = "image",
        caption_key: str = "caption",
    ) -> None:
        check_choice("interpolation", interpolation, RESAMPLING)
        check_choice("missing_caption", missing_caption, ("raise", "skip", "empty"))
        check_choice("long_caption", long_caption, ("truncate", "raise", "skip"))
        check_choice("split", split, (None, *SPLIT_FOLDERS))
        check_choice("on_error", on_error, ("raise", "skip"))
        check_probability("flip_p", flip_p)
        self.size, self.crop_size = _sizes(size, crop_size)
        self.random_crop, self.flip_p, self.interpolation = random_crop, flip_p, interpolation
        self.on_error, self.min_size, self.max_pixels = on_error, min_size, max_pixels
        self.image_key, self.caption_key, self.captioned = image_key, caption_key, captions is not None
        self.caption_encoding = caption_encoding
        self.caption_policy = CaptionPolicy(missing_caption, max_caption_chars, long_caption)
        self.skipped: dict[str, str] = {}  # name -> reason

        whole = existing_folder("root", root, self.content)
        self.root = split_root(whole, split) if files is None else whole
        table = _table(captions, (self.root, whole))
        texts = self._table_captions(table, image_column, caption_column) if table is not None else None
        if files is not None:
            listed = dict.fromkeys(read_list(files, self.root, self.suffixes))
            names = list(listed) if texts is None else [name for name in texts if name in listed]
        else:
            names = list(texts) if texts is not None else scan(self.root, self.suffixes)
        self.class_names = class_order(names, classes) if class_labels else None
        if files is None and self.root == whole:
            names = names_of_split(names, split, validation_fraction)
        items = [item for name in names if (item := self._item(name, texts)) is not None]
        self.items = self._readable(items) if on_error == "skip" else items
        numbers = {name: i for i, name in enumerate(self.class_names or ())}
        self.labels = [numbers[class_of(item.name)] for item in self.items] if class_labels else None
        if not self.items:
            problem = "no images in it" + (f" for split {split}" if split else "")
            if self.skipped:
                first = ": ".join(next(iter(self.skipped.items())))
                problem += f" can be used: {len(self.skipped)} skipped, first {first}"
            raise DataConfigError("root", str(self.root), problem, f"set {{param}} to a folder of {self.content}")
        self._report()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, captions = self.items[index]
        try:
            image = self._read(name)
        except BadImageError as error:
            raise BadImageError(error.path, f"{error.reason}; repair or remove it, or set on_error to skip") from error
        sample = {**self._values(image, index), "file_path_": str(self.root / name)}
        if self.captioned:
            caption = random.choice(captions) if len(captions) > 1 else captions[0]
            sample |= {"caption": caption, "txt": caption, self.caption_key: caption}
        if self.labels is not None and self.class_names is not None:
            sample |= {"class_label": self.labels[index], "human_label": self.class_names[self.labels[index]]}
        return sample

    @cached_property
    def fingerprint(self) -> dict[str, int | str]:
        """Hashes of the images' names in their order, and of their captions and class names."""
        labels = [[item.captions for item in self.items], self.labels, self.class_names]
        return {"files": _digest([item.name for item in self.items]), "labels": _digest(labels)}

    def file_of(self, index: int) -> Path:
        """Return the file of a sample."""
        return self.root / self.items[index].name

    def _read(self, name: str) -> Image.Image:
        path = self.root / name
        image = load_image(path, self.max_pixels)
        if min(image.size) < self.min_size:
            raise BadImageError(path, f"{image.width}x{image.height} pixels, below min_size {self.min_size}")
        return image

    def _check(self, name: str) -> None:
        """Raise BadImageError if the image is unusable."""
        self._read(name)

    def _values(self, image: Image.Image, index: int) -> dict[str, Any]:
        """Return the entries of a sample that come from its image; subclasses override this."""
        return {self.image_key: to_array(self._view(image).apply(image, self.interpolation))}

    def _view(self, image: Image.Image) -> View:
        """Return the scaling, crop and flip of a sample, random as configured."""
        target = self.size
        if target is None and (image.height < self.crop_size[0] or image.width < self.crop_size[1]):
            target = self.crop_size
        scaled = cover(image, target) if target is not None else image.size
        box = crop_box(scaled, self.crop_size, self.random_crop)
        return View(scaled, box, bool(self.flip_p) and random.random() < self.flip_p)

    def _table_captions(
        self, table: Path, image_column: str | None, caption_column: str | None
    ) -> dict[str, list[str]]:
        """Return {image: captions} in the order of the table."""
        try:
            rows = list(read_table(table, image_column, caption_column, self.caption_encoding))
        except DataConfigError:
            raise
        except (OSError, ValueError) as error:
            raise DataConfigError("captions", str(table), str(error), "set {param} to a readable table") from error
        texts: dict[str, list[str]] = {}
        for row in rows:
            if row.problem:
                self._unusable(f"{table} line {row.line}", row.problem)
            elif row.image not in texts and not (self.root / row.image).is_file():
                self._unusable(f"{table} line {row.line}", f"no such file: {self.root / row.image}")
            else:
                texts.setdefault(row.image, []).extend(row.captions)
        return texts

    def _item(self, name: str, texts: dict[str, list[str]] | None) -> Item | None:
        """Return an image with its captions; None if the policies skip it."""
        if not self.captioned:
            return Item(name)
        if texts is not None:
            found, why_missing = texts[name], "its caption in the table is blank"
        else:
            sidecar = (self.root / name).with_suffix(".txt")
            why_missing = f"no text in {sidecar}"
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

    def _unusable(self, what: str, reason: str) -> None:
        if self.on_error == "raise":
            raise DataConfigError("on_error", "raise", f"{what}: {reason}", "repair it, or set {param} to skip")
        self.skipped[what] = reason

    def _readable(self, items: list[Item]) -> list[Item]:
        """Return the items whose images can be decoded."""

        def problem(item: Item) -> str:
            try:
                self._check(item.name)
            except BadImageError as error:
                return error.reason or str(error)
            return ""

        with ThreadPoolExecutor(usable_cpus()) as pool:  # decoders release the interpreter's lock
            checks = tqdm(pool.map(problem, items), "checking images", len(items), leave=False, delay=3, disable=None)
            problems = dict(zip((item.name for item in items), checks))
        self.skipped |= {name: reason for name, reason in problems.items() if reason}
        return [item for item in items if not problems[item.name]]

    def _report(self) -> None:
        captions = f", {sum(len(item.captions) for item in self.items)} captions" if self.captioned else ""
        classes = f", {len(self.class_names)} classes" if self.class_names is not None else ""
        logger.info("%s: %d images%s%s", self.root, len(self), captions, classes)
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

    def __init__(self, root: str | None = None, **options: Any) -> None:
        options |= {} if root is None else {"root": root}
        super().__init__(**{**self.defaults, **options})


class ListedImages(Defaults):
    """Images of a folder that a list names; by default both at the published paths, relative to the working directory.

    files: the list, one path below root on each line. split: "train" and "validation" divide the folder by a hash of
    the names instead. Other parameters as in ImageFolder.
    """

    def __init__(self, size: Size = 256, files: str | None = None, split: str | None = None, **options: Any) -> None:
        listed = (files or self.defaults["files"]) if split is None else None
        super().__init__(size=size, files=listed, split=split, **options)


def _digest(content: object) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _sizes(size: Size | None, crop_size: Size | None) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """Return the (height, width) that an image is scaled to cover, and the (height, width) of the crop."""

    def pair(param: str, value: Size | None) -> tuple[int, int]:
        try:
            if value is None:
                raise ValueError("not set")
            return height_and_width(value)
        except (TypeError, ValueError) as error:
            advice = "set {param} to a positive integer or [height, width]"
            raise DataConfigError(param, value, "not a size", advice) from error

    if size is None and crop_size is not None:
        return None, pair("crop_size", crop_size)
    scaled = pair("size", size)
    kept = scaled if crop_size is None else pair("crop_size", crop_size)
    if kept[0] > scaled[0] or kept[1] > scaled[1]:
        raise DataConfigError("crop_size", crop_size, f"larger than size {size}", f"set {{param}} to at most {size}")
    return scaled, kept


def _table(captions: str | None, folders: Sequence[Path]) -> Path | None:
    """Find a captions table, as given or in the folders; return None for sidecars and without captions."""
    if captions is None or captions == SIDECAR:
        return None
    if Path(captions).suffix.lower() not in TABLES:
        advice = f"set {{param}} to {SIDECAR}, null, or a file of type {', '.join(TABLES)}"
        raise DataConfigError("captions", captions, "unknown", advice)
    found = next(
        (path for folder in (Path(), *folders) if (path := folder / Path(captions).expanduser()).is_file()), None
    )
    if found is None:
        problem = f"no such file, here or in {folders[-1]}"
        raise DataConfigError("captions", captions, problem, "set {param} to a captions table")
    return found
