"""Triples of an image, an instruction and the edited image (InstructPix2Pix, arXiv 2211.09800)."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from ldm.config.types import PathText, PositiveInt, Probability
from ldm.data.base import DataConfigError, check_choice
from ldm.data.captions import Columns
from ldm.data.folder import ImageFolder, Item
from ldm.data.image import Size, View, crop_box, load_image, load_like, to_array
from ldm.data.listing import existing_folder


class EditFolder(ImageFolder):
    """Edits that a table in a folder lists, a row for each: the image before, the instruction, the edited image.

    An item holds `edited` and `edit`: {`c_concat`: the image before, `c_crossattn`: the instruction}; both images have
    the same crop and flip.

    triples: a .csv, .tsv or .jsonl table in root. before_column, image_column (of the edited image), caption_column (of
    the instruction): None takes the first match of before, input_image, input, original_image; of after, edited_image,
    edited, output_image; and of instruction, edit_prompt, edit, text. An edited image has one image before, which may
    have several edited ones, and may have several instructions: each sample takes a random one. Other parameters as in
    ImageFolder.
    """

    content = "images, with a table of triples"
    columns = Columns(
        image=("after", "edited_image", "edited", "output_image"),
        caption=("instruction", "edit_prompt", "edit", "text"),
        paired=("before", "input_image", "input", "original_image"),
        paired_param="before_column",
    )

    def __init__(
        self,
        root: PathText | None = None,
        triples: PathText = "triples.csv",
        size: Size | None = 256,
        before_column: str | None = None,
        **options: Any,
    ) -> None:
        for param in ("captions", "files", "class_labels", "classes", "image_key", "caption_key"):
            if param in options:
                raise DataConfigError(param, options[param], "triples do not take it", "remove {param}")
        self.paired_column = before_column
        try:
            super().__init__(root, size, captions=triples, image_key="edited", **options)
        except DataConfigError as error:
            if error.param == "captions":  # its name here
                raise DataConfigError("triples", error.value, error.problem, error.advice) from error
            raise

    def _item(self, name: str, texts: dict[str, list[str]] | None) -> Item | None:
        item = super()._item(name, texts)
        if item is not None and self.paired_file(name) is None:
            self._unusable(name, f"no such file: {self.whole / self.paired[name]}, its image before")
            return None
        return item

    def _sample(self, index: int) -> dict[str, Any]:
        sample = super()._sample(index)
        sample["edit"]["c_crossattn"] = sample["caption"]
        return sample

    def _views(self, image: Image.Image, view: View, index: int) -> dict[str, Any]:
        before = self._read_before(self.items[index].name, image)
        arrays = (to_array(view.apply(each, self.interpolation)) for each in (image, before))
        return {"edited": next(arrays), "edit": {"c_concat": next(arrays)}}

    def _check(self, name: str) -> None:
        self._read_before(name, self._read(name))

    def _read_before(self, name: str, edited: Image.Image) -> Image.Image:
        return load_like(self.paired_file(name) or self.whole / self.paired[name], edited, self.max_pixels)


class EditDataset(Dataset):
    """The published dataset of InstructPix2Pix: `path`/seeds.json lists [folder, seeds]. A folder holds prompt.json,
    whose key `edit` is the instruction, and for each seed the images SEED_0.jpg (before) and SEED_1.jpg (edited).

    split: train, val or test, the shares `splits` of the folders in their order. Both images are scaled to a square of
    a random side in [min_resize_res, max_resize_res], cropped to crop_res at random and flipped with flip_prob. An item
    has the form of EditFolder's.
    """

    def __init__(
        self,
        path: PathText,
        split: str = "train",
        splits: Sequence[float] = (0.9, 0.05, 0.05),
        min_resize_res: PositiveInt = 256,
        max_resize_res: PositiveInt = 256,
        crop_res: PositiveInt = 256,
        flip_prob: Probability = 0.0,
    ) -> None:
        check_choice("split", split, ("train", "val", "test"))
        if len(splits) != 3 or abs(sum(splits) - 1) > 1e-6 or min(splits) < 0:
            problem = "expected three shares whose sum is 1"
            raise DataConfigError("splits", list(splits), problem, "set {param} to e.g. [0.9, 0.05, 0.05]")
        if not crop_res <= min_resize_res <= max_resize_res:
            problem = f"expected crop_res <= min_resize_res <= max_resize_res, got {min_resize_res}, {max_resize_res}"
            raise DataConfigError("crop_res", crop_res, problem, "set {param} to at most min_resize_res")
        self.root = existing_folder("path", path, "edits, with seeds.json")
        self.min_side, self.max_side, self.side, self.flip_p = min_resize_res, max_resize_res, crop_res, flip_prob
        listed = _read_json(self.root / "seeds.json")
        first = ("train", "val", "test").index(split)
        ends = [math.floor(len(listed) * share) for share in (sum(splits[:first]), sum(splits[: first + 1]))]
        self.seeds = listed[ends[0] : ends[1]]

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, seeds = self.seeds[index]
        folder, seed, scaled = self.root / name, random.choice(seeds), random.randint(self.min_side, self.max_side)
        view = View((scaled, scaled), crop_box((scaled, scaled), self.side, True), random.random() < self.flip_p)
        before, edited = (to_array(view.apply(load_image(folder / f"{seed}_{k}.jpg"), "lanczos")) for k in (0, 1))
        instruction = _read_json(folder / "prompt.json")["edit"]
        return {"edited": edited, "edit": {"c_concat": before, "c_crossattn": instruction}}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        advice = "set {param} to a folder in the layout of InstructPix2Pix' dataset"
        raise DataConfigError("path", str(path), str(error), advice) from error
