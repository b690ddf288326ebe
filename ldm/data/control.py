"""Images with the hints of a ControlNet, from files beside them or from a detector (arXiv 2302.05543, section 4)."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.config.model_info import CANNY, DETECTORS
from ldm.config.types import NonNegativeInt, PathText
from ldm.data.base import DataConfigError, check_choice
from ldm.data.captions import Columns
from ldm.data.detectors import canny_edges, is_depth_model, level_ranges, make_detector, to_hint
from ldm.data.digits import Digits
from ldm.data.folder import ImageFolder, Item
from ldm.data.image import BadImageError, View, from_array, load_like, to_array
from ldm.data.listing import NamedAlike


class ControlFolder(ImageFolder):
    """Images of a folder, with `hint` (H, W, 3) in [0, 1] that has the same scaling, crop and flip.

    One of these is set. hints: a folder of hints that are named as the images below root (`a/cat.png` for `a/cat.jpg`).
    hint_column: the column of the captions table that names the hints, as it names the images. detector: canny or
    depth, which makes the hint of the cropped image.
    canny: thresholds of the Canny detector. depth_weights: folder with transformers' DPT for the depth detector.
    hint_key: name in the batch. Other parameters as in ImageFolder.
    """

    def __init__(
        self,
        root: PathText | None = None,
        hints: PathText | None = None,
        hint_column: str | None = None,
        detector: str = "none",
        canny: tuple[NonNegativeInt, NonNegativeInt] = CANNY,
        depth_weights: PathText | None = None,
        hint_key: str = "hint",
        **options: Any,
    ) -> None:
        check_choice("detector", detector, DETECTORS)
        if not 0 <= canny[0] <= canny[1]:
            advice = f"set {{param}} to [low, high], e.g. {list(CANNY)}"
            raise DataConfigError("canny", list(canny), "expected 0 <= low <= high", advice)
        own: dict[str, Any] = {"canny": None if tuple(canny) == CANNY else list(canny), "depth": depth_weights}
        for needs, value in own.items():
            if value is not None and detector != needs:
                param = "depth_weights" if needs == "depth" else needs
                problem = f"is for detector {needs}, but detector is {detector}"
                raise DataConfigError(param, value, problem, "remove {param}, or set detector")
        if detector == "depth" and not is_depth_model(depth_weights):
            advice = "set {param} to a folder with transformers' DPT (Intel/dpt-hybrid-midas)"
            raise DataConfigError("depth_weights", depth_weights, "has no config.json", advice)
        self.hint_key, self._detect = hint_key, make_detector(detector, canny, depth_weights)
        given = {"hints": hints, "hint_column": hint_column, "detector": None if detector == "none" else detector}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            problem = f"{' and '.join(named)} exclude each other" if named else "nothing says where the hints are"
            advice = f"set one of hints (a folder), hint_column, and {{param}} ({' or '.join(DETECTORS[1:])})"
            raise DataConfigError("detector", detector, problem, advice)
        self.detected, self._hints = detector != "none", hints
        if hint_column is not None:
            if options.get("captions") in (None, "sidecar"):
                advice = "set captions to the .csv, .tsv or .jsonl table that has it"
                raise DataConfigError("hint_column", hint_column, "there is no table with this column", advice)
            self.columns = Columns(paired=(hint_column,), paired_param="hint_column")
            self.paired_column = hint_column
        super().__init__(root, **options)

    @cached_property
    def _named_alike(self) -> NamedAlike | None:
        return None if self._hints is None else NamedAlike("hints", self._hints, self.root, self.whole)

    def _hints_of(self, name: str) -> list[Path]:
        """The files of an image's hint, which should be one."""
        if self._named_alike is not None:
            return self._named_alike.of(name)
        return [path] if (path := self.paired_file(name)) else []

    def _item(self, name: str, texts: dict[str, list[str]] | None) -> Item | None:
        item = super()._item(name, texts)
        if item is None or self.detected:
            return item
        if self._named_alike is not None:
            problem = self._named_alike.problem(name)
        else:
            problem = "" if self._hints_of(name) else f"has no hint: {self.whole / self.paired[name]}: no such file"
        if problem:
            self._unusable(name, problem)
            return None
        return item

    def _check(self, name: str) -> None:
        image = self._read(name)
        if not self.detected:
            self._read_hint(name, image)

    def _views(self, image: Image.Image, view: View, index: int) -> dict[str, Any]:
        seen = view.apply(image, self.interpolation)
        if self.detected:
            hint = self._detect(seen)
        else:
            hint = view.apply(self._read_hint(self.items[index].name, image), self.interpolation)
        return {self.image_key: to_array(seen), self.hint_key: to_hint(hint)}

    def _read_hint(self, name: str, image: Image.Image) -> Image.Image:
        (path,) = self._hints_of(name)
        hint = load_like(path, image, self.max_pixels)
        if max(high for _, high in level_ranges(hint)) == 1:
            raise BadImageError(path, "its largest value is 1 of 255, nearly black: save hints with 255 for white")
        return hint

    def _files(self, index: int) -> list[Path]:
        hints = [] if self._named_alike is None else self._named_alike.of(self.items[index].name)
        return [*super()._files(index), *hints]

    def _pairs(self) -> list[str]:
        if self._hints is None:
            return super()._pairs()
        return [self._hints_of(item.name)[0].name for item in self.items]


class DigitEdges(Digits):
    """Digits with their Canny edges as `hint`, (size, size, 3) in [0, 1]: 1 on edges, else 0."""

    def __init__(self, split: str = "train", size: int = 32) -> None:
        super().__init__(split, size)
        self.hints = np.stack([to_hint(canny_edges(from_array(image))) for image in self.images])

    def __getitem__(self, index: int) -> dict:
        return {**super().__getitem__(index), "hint": self.hints[index]}
