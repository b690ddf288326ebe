"""A folder of pictures as a dataset, with captions or class labels."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data import image as pictures
from ldm.data.base import DataConfigError
from ldm.data.captions import SIDECAR, TABLES, CaptionPolicy, read_sidecar, read_table
from ldm.data.image import EXTENSIONS, MAX_PIXELS, RESAMPLING, BadImageError, Size, View
from ldm.data.listing import (
    SPLIT_FOLDERS,
    class_of,
    class_order,
    divided,
    existing_folder,
    part,
    read_list,
    scan,
    split_folder,
)
from ldm.data.order import usable_cpus

logger = logging.getLogger(__name__)


class Item(NamedTuple):
    """One picture: its path below the root, and its captions (none where the dataset has none)."""

    name: str
    captions: tuple[str, ...] = ()


class ImageFolder(Dataset):
    """Pictures below a folder, at any depth, in the order of their names.

    An item holds `image` float32 (H, W, 3) in [-1, 1] and `file_path_`; with captions `caption` and the same as `txt`; with class labels
    `class_label` (int64 in a batch) and `human_label`.

    root: the folder. size: pictures are scaled, proportions kept, to cover this (a side, or [height, width]); None leaves those that cover
    crop_size as they are. crop_size: so much of them is kept (None is all of `size`), the middle or, with random_crop, any place.
    flip_p: how likely a picture is mirrored. files: a text file with the pictures of this dataset, one path below root on each line; it
    takes the place of split. interpolation: bicubic, lanczos, bilinear, box or nearest; antialiased when shrinking.

    captions: None; "sidecar" (cat.jpg has cat.txt beside it, each line one caption); or a .csv, .tsv or .jsonl table, which then also lists
    the pictures (paths relative to root). image_column, caption_column: its columns; None takes the first there is of file_name, filename,
    file, image, image_path, path, and of text, caption, captions, prompt, txt. A picture may have several captions (lines, records, a JSON
    list): each sample draws one. caption_encoding: if not UTF-8. missing_caption: raise, skip (leave the picture out) or empty
    (caption ""); blank is missing. long_caption: above max_caption_chars truncate (what is dropped is logged once), raise or skip.

    class_labels: number the folders directly below root, in the order of their names. classes: another order, as a list of names or as the
    folder that holds the class folders (for a validation folder that may lack some).

    split: None is all of root. "train" and "validation" are the sub-folders of root with these names if they exist; otherwise
    validation_fraction of the pictures, chosen by a hash of their names, are for validation and the others for training.

    on_error: raise stops at the first file that cannot be used. skip decodes every picture once when the dataset is built, leaves out what
    cannot be used and logs the count; `skipped` says which and why. min_size: a shorter side below this cannot be used (placeholders of 1x1
    pixels). max_pixels: nor can larger pictures. image_key, caption_key: names in the batch (Stable Diffusion's YAML says jpg and txt).
    """

    holding = "pictures"  # what root is a folder of
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
        _choice("interpolation", interpolation, tuple(RESAMPLING))
        _choice("missing_caption", missing_caption, ("raise", "skip", "empty"))
        _choice("long_caption", long_caption, ("truncate", "raise", "skip"))
        _choice("split", split, (None, *SPLIT_FOLDERS))
        _choice("on_error", on_error, ("raise", "skip"))
        if not 0 <= flip_p <= 1:
            raise DataConfigError("flip_p", flip_p, "not a probability", "set {param} between 0 and 1")
        self.size, self.crop_size = _sizes(size, crop_size)
        self.random_crop, self.flip_p, self.interpolation = random_crop, flip_p, interpolation
        self.on_error, self.min_size, self.max_pixels = on_error, min_size, max_pixels
        self.image_key, self.caption_key, self.captioned = image_key, caption_key, captions is not None
        self.caption_encoding, self.caption_policy = (
            caption_encoding,
            CaptionPolicy(missing_caption, max_caption_chars, long_caption),
        )
        self.skipped: dict[str, str] = {}  # what was left out -> why

        whole = existing_folder("root", root, self.holding)
        by_folders = files is None and divided(whole)
        self.root = split_folder(whole, split) if by_folders else whole
        table = _table(captions, (self.root, whole))
        texts = self._table_captions(table, image_column, caption_column) if table is not None else None
        if files is not None:
            listed = dict.fromkeys(read_list(files, self.root, self.suffixes))
            names = list(listed) if texts is None else [name for name in texts if name in listed]
        else:
            names = list(texts) if texts is not None else scan(self.root, self.suffixes)
        self.class_names = class_order(names, classes) if class_labels else None
        if files is None and not by_folders:
            chosen = part(names, split, validation_fraction)
            names = [name for name in names if name in chosen]
        items = [item for name in names if (item := self._item(name, texts)) is not None]
        self.items = self._readable(items) if on_error == "skip" else items
        number = {name: i for i, name in enumerate(self.class_names or ())}
        self.labels = [number[class_of(item.name)] for item in self.items] if class_labels else None
        if not self.items:
            why = "no pictures in it" + (f" for split {split}" if split else "")
            if self.skipped:
                why += f" can be used: {len(self.skipped)} skipped, first {': '.join(next(iter(self.skipped.items())))}"
            raise DataConfigError("root", str(self.root), why, f"set {{param}} to a folder of {self.holding}")
        self._report()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, captions = self.items[index]
        try:
            picture = self._read(name)
        except BadImageError as error:
            raise BadImageError(error.path, f"{error.reason}; mend or remove it, or set on_error to skip") from error
        sample = {**self._values(picture, index), "file_path_": str(self.root / name)}
        if self.captioned:
            caption = random.choice(captions) if len(captions) > 1 else captions[0]
            sample |= {"caption": caption, "txt": caption, self.caption_key: caption}
        if self.labels is not None:
            sample |= {"class_label": self.labels[index], "human_label": self.class_names[self.labels[index]]}
        return sample

    def _read(self, name: str) -> Image.Image:
        path = self.root / name
        picture = pictures.load_image(path, self.max_pixels)
        if min(picture.size) < self.min_size:
            raise BadImageError(path, f"{picture.width}x{picture.height} pixels, below min_size {self.min_size}")
        return picture

    def _check(self, name: str) -> None:
        """Raise BadImageError for a picture that cannot be used."""
        self._read(name)

    def _values(self, picture: Image.Image, index: int) -> dict[str, Any]:
        """What a sample holds of its picture; families that need more than the picture say it here."""
        return {self.image_key: pictures.to_array(self._view(picture).of(picture, self.interpolation))}

    def _view(self, picture: Image.Image) -> View:
        """What is seen of a picture, drawn anew for each sample."""
        small = self.size is None and (picture.height < self.crop_size[0] or picture.width < self.crop_size[1])
        target = self.crop_size if small else self.size
        scaled = pictures.cover(picture, target) if target is not None else picture.size
        box = (pictures.random_box if self.random_crop else pictures.center_box)(scaled, self.crop_size)
        return View(scaled, box, bool(self.flip_p) and random.random() < self.flip_p)

    def _table_captions(
        self, table: Path, image_column: str | None, caption_column: str | None
    ) -> dict[str, list[str]]:
        """Captions by picture, in the order of the table."""
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
                self._unusable(f"{table} line {row.line}", f"there is no {self.root / row.image}")
            else:
                texts.setdefault(row.image, []).extend(row.captions)
        return texts

    def _item(self, name: str, texts: dict[str, list[str]] | None) -> Item | None:
        """A picture with its captions; None where the policies leave it out."""
        if not self.captioned:
            return Item(name)
        if texts is not None:
            found, why_missing = texts[name], "its line in the table is blank"
        else:
            sidecar = (self.root / name).with_suffix(".txt")
            why_missing = f"no text in {sidecar}"
            try:
                found = read_sidecar(sidecar, self.caption_encoding) if sidecar.is_file() else []
            except (OSError, UnicodeError, ValueError) as error:
                if isinstance(error, DataConfigError):
                    raise
                self._unusable(str(sidecar), str(error))
                return None
        captions, left_out = self.caption_policy.apply(name, found, why_missing)
        if left_out:
            self.skipped[name] = left_out
        return None if left_out else Item(name, captions)

    def _unusable(self, what: str, why: str) -> None:
        if self.on_error == "raise":
            raise DataConfigError("on_error", "raise", f"{what}: {why}", "mend it, or set {param} to skip")
        self.skipped[what] = why

    def _readable(self, items: list[Item]) -> list[Item]:
        """The items whose pictures can be decoded."""

        def problem(item: Item) -> str:
            try:
                self._check(item.name)
            except BadImageError as error:
                return error.reason or str(error)
            return ""

        with ThreadPoolExecutor(usable_cpus()) as pool:  # decoders release the interpreter's lock
            problems = list(
                tqdm(pool.map(problem, items), "checking pictures", len(items), leave=False, delay=3, disable=None)
            )
        self.skipped |= {item.name: why for item, why in zip(items, problems) if why}
        return [item for item, why in zip(items, problems) if not why]

    def _report(self) -> None:
        captions = f", {sum(len(item.captions) for item in self.items)} captions" if self.captioned else ""
        classes = f", {len(self.class_names)} classes" if self.class_names is not None else ""
        logger.info("%s: %d pictures%s%s", self.root, len(self), captions, classes)
        if self.skipped:
            first = "; ".join(f"{what}: {why}" for what, why in list(self.skipped.items())[:3])
            total = len(self) + len(self.skipped)
            logger.warning(
                "%s: kept %d of %d, skipped %d (first: %s)", self.root, len(self), total, len(self.skipped), first
            )


def _choice(param: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise DataConfigError(
            param, value, "unknown", f"set {{param}} to one of {', '.join('null' if c is None else c for c in choices)}"
        )


def _sizes(size: Size | None, crop_size: Size | None) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """(height, width) that a picture is scaled to cover, and (height, width) that is kept of it."""
    pairs: list[tuple[int, int] | None] = []
    for param, value in (("size", size), ("crop_size", size if crop_size is None else crop_size)):
        if param == "size" and size is None and crop_size is not None:
            pairs.append(None)
            continue
        try:
            pairs.append(pictures.height_and_width(value))
        except (TypeError, ValueError) as error:
            raise DataConfigError(
                param, value, "no size", "set {param} to a positive integer or [height, width]"
            ) from error
    if size is not None and any(kept > scaled for kept, scaled in zip(pairs[1], pairs[0])):
        raise DataConfigError("crop_size", crop_size, f"larger than size {size}", f"set {{param}} to at most {size}")
    return pairs[0], pairs[1]


def _table(captions: str | None, folders: Sequence[Path]) -> Path | None:
    """The file of a captions table, looked for as it is named and then in the folders; None for sidecars and for no captions."""
    if captions is None or captions == SIDECAR:
        return None
    if Path(captions).suffix.lower() not in TABLES:
        raise DataConfigError(
            "captions", captions, "unknown", f"set {{param}} to {SIDECAR}, null, or a file of type {', '.join(TABLES)}"
        )
    places = [Path(captions).expanduser(), *(folder / captions for folder in folders)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise DataConfigError(
            "captions", captions, f"no such file, nor in {folders[-1]}", "set {param} to a captions table"
        )
    return found
