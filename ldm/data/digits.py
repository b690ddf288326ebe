"""Scanned handwritten digits with captions, from scikit-learn: no download needed."""

import importlib.util
import itertools
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import max_pool2d
from torch.utils.data import Dataset

from ldm.config.types import PositiveInt
from ldm.data.base import DataConfigError, check_choice
from ldm.data.captions import PromptTemplates
from ldm.data.image import to_array

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# A caption is one of each. Many irrelevant words teach a model to find the digit even among words that it never saw.
OPENINGS = (
    "", "draw ", "please write ", "a photo of ", "a scan of ", "a picture of ", "a drawing of ", "this is ", "show me ",
    "someone wrote ",
)  # fmt: skip
SUBJECTS = (
    "a handwritten {name}", "{name}", "{article} {name}", "handwritten {name}", "the digit {name}", "the number {name}",
    "the numeral {name}", "a handwritten digit {name}",
)  # fmt: skip
ENDINGS = (
    "", ", please", ", written by hand", " in black ink", " on white paper", " with a pen", " by a child",
    " in an old letter",
)  # fmt: skip
EDITS = {  # instructions by edit
    "thick": ("make it thick", "make the strokes thicker", "use a thick pen", "bold, please"),
    "thin": ("make it thin", "make the strokes thinner", "use a thin pen", "lighter, please"),
}
STROKE = 2  # pixels by which edits widen or narrow a stroke
PLAIN = 2 * len(SUBJECTS)
MARGIN = 1  # pixels of white paper around a scan, whose ink often touches its edge
HELD_OUT_EVERY = 5  # every fifth scan of each digit, in the order of the file, is held out


class Digits(Dataset):
    """The 1,797 digits in scikit-learn, upscaled, dark on white: 8x8 scans in 17 grey levels from the UCI dataset
    "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998, https://doi.org/10.24432/C50P49).

    split: "train" (1,442 scans), "held_out" (355: every fifth scan of each digit) or "all".
    size: side of the square image in pixels.
    inverted: white on black. slant: degrees by which upright strokes lean to the right. Both are for adapters to learn.
    digits: those digits alone. count: the first scans alone. templates, subject: other captions, as in ImageFolder.

    An item holds `image` float32 (size, size, 3) in [-1, 1], `class_label` 0..9, `human_label` ("seven") and `caption`.
    In the training split, torch's generator chooses the caption ("the digit 7", "a handwritten seven", ...) anew for
    each access; in the others it depends on the index alone.
    """

    class_names = WORDS

    def __init__(
        self,
        split: str = "train",
        size: int = 32,
        inverted: bool = False,
        slant: Annotated[float, "[-45, 45]"] = 0.0,
        digits: Sequence[Annotated[int, "[0, 9]"]] | None = None,
        count: PositiveInt | None = None,
        templates: Sequence[str] = (),
        subject: str | None = None,
    ) -> None:
        check_choice("split", split, ("train", "held_out", "all"))
        if size < 16:
            raise DataConfigError("size", size, "too small for the scans of 8x8 pixels", "set {param} to 16 or more")
        self.split, self.size = split, size
        scans, labels = load_scans()
        chosen = split_indices(labels, split)
        chosen = chosen[np.isin(labels[chosen], range(10) if digits is None else list(digits))][:count]
        self.labels = labels[chosen]
        self.images = np.stack([upscale_scan(scan, size, slant) for scan in scans[chosen]])  # (N, size, size, 3)
        if inverted:
            self.images = -self.images
        self.prompts = PromptTemplates(templates, subject, captioned=True)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        digit = int(self.labels[index])
        every = captions(digit)
        choice = index % len(every)
        if self.split == "train":  # every second caption has neither opening nor ending
            choice = int(torch.randint(PLAIN if torch.randint(2, ()) else len(every), ()))
        return {
            "image": self.images[index],
            "caption": self.prompts(every[choice]),
            "class_label": digit,
            "human_label": WORDS[digit],
        }


class DigitEdits(Digits):
    """Digits with an instruction and the edited digit: thicker or thinner strokes.

    An item holds `edited`, and `edit`: {`c_concat`: the digit, `c_crossattn`: an instruction}, see ldm.data.edits. In
    the training split, torch's generator chooses edit and instruction; in the others they depend on the index alone.
    edits: which of EDITS.
    """

    def __init__(self, split: str = "train", size: int = 32, edits: Sequence[str] = tuple(EDITS)) -> None:
        super().__init__(split, size)
        for name in edits:
            check_choice("edits", name, EDITS)
        self.edits = tuple(edits)

    def __getitem__(self, index: int) -> dict:
        every = [(name, instruction) for name in self.edits for instruction in EDITS[name]]
        choice = int(torch.randint(len(every), ())) if self.split == "train" else index % len(every)
        name, instruction = every[choice]
        before = self.images[index]
        edit = {"c_concat": before, "c_crossattn": instruction}
        return {"edited": edited(before, name), "edit": edit, "class_label": int(self.labels[index])}


def edited(image: np.ndarray, name: str) -> np.ndarray:
    """Return an edited digit, dark on white, (size, size, 3) in [-1, 1]: strokes STROKE pixels wider or narrower."""
    sign = -1.0 if name == "thick" else 1.0  # the maximum of the negative image spreads its dark strokes
    x = sign * torch.from_numpy(image).permute(2, 0, 1)
    return (sign * max_pool2d(x, STROKE + 1, 1, STROKE // 2)).permute(1, 2, 0).numpy()


@cache
def captions(digit: int) -> list[str]:
    """Return all captions of a digit, with its word and its numeral: "a handwritten seven", "a handwritten 7", ...

    The first PLAIN have neither opening nor ending.
    """
    article = "an" if digit == 8 else "a"
    return [
        opening + subject.format(article=article, name=name) + ending
        for opening, ending, subject in itertools.product(OPENINGS, ENDINGS, SUBJECTS)
        for name in (WORDS[digit], str(digit))
    ]


@cache
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Load scikit-learn's digits -> scans (1797, 8, 8) float64 with ink 0..16, labels (1797,) int64."""
    package = importlib.util.find_spec("sklearn")  # optional, for the quickstart only; its import takes a second
    if package is None or package.origin is None:
        raise ImportError("the digits need scikit-learn: pip install -e '.[quickstart]'")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not file.is_file():
        from sklearn.datasets import load_digits  # of a version with other files

        return load_digits(return_X_y=True)
    table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def split_indices(labels: np.ndarray, split: str) -> np.ndarray:
    """Return the indices of a split in ascending order: deterministic, with the same share of every digit."""
    held_out = np.zeros(len(labels), dtype=bool)
    for digit in np.unique(labels):
        held_out[np.flatnonzero(labels == digit)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]] = True
    return np.flatnonzero({"train": ~held_out, "held_out": held_out, "all": np.ones_like(held_out)}[split])


def upscale_scan(scan: np.ndarray, size: int, slant: float = 0.0) -> np.ndarray:
    """Convert ink 0..16 (8, 8) to float32 (size, size, 3) in [-1, 1], dark on white, with a margin; bicubic.

    slant: degrees by which upright strokes lean to the right.
    """
    paper = Image.fromarray(np.round(255 * (1 - np.pad(scan, MARGIN) / 16)).astype(np.uint8))  # (10, 10)
    image = paper.resize((size, size), Image.Resampling.BICUBIC)
    if slant:
        shear = math.tan(math.radians(slant))
        # Column x of row y is column x + shear * (y - size / 2) of the upright image.
        matrix = (1, shear, -shear * size / 2, 0, 1, 0)
        image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=255)
    return to_array(image)
