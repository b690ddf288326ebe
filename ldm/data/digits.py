"""Scanned handwritten digits with captions, from scikit-learn: nothing is downloaded."""

import itertools
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.data.image import to_array

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# A caption is one of each. Many words that mean nothing here teach a model to look for the one that does, also among words it never saw.
OPENINGS = (
    "",
    "draw ",
    "please write ",
    "a photo of ",
    "a scan of ",
    "a picture of ",
    "a drawing of ",
    "this is ",
    "show me ",
    "someone wrote ",
)
SUBJECTS = (
    "a handwritten {name}",
    "{name}",
    "{article} {name}",
    "handwritten {name}",
    "the digit {name}",
    "the number {name}",
    "the numeral {name}",
    "a handwritten digit {name}",
)
ENDINGS = (
    "",
    ", please",
    ", written by hand",
    " in black ink",
    " on white paper",
    " with a pen",
    " by a child",
    " in an old letter",
)
PLAIN = 2 * len(SUBJECTS)
SPLITS = ("train", "held_out", "all")
MARGIN = 1  # pixels of white paper around a scan, whose ink often touches its edge
HELD_OUT_EVERY = 5  # of each digit's scans, in the order of the file, the 5th, 10th, ... are held out


class Digits(Dataset):
    """The 1,797 digits that scikit-learn ships, enlarged, dark ink on white paper; they are 8x8 scans in 17 greys from the UCI set
    "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998, https://doi.org/10.24432/C50P49).

    split: "train" (1,442 scans), "held_out" (355: of each digit every fifth scan, always the same ones) or "all".
    size: side of the square picture in pixels.

    An item holds `image` float32 (size, size, 3) in [-1, 1], `class_label` 0..9, `human_label` ("seven") and `caption`. In the training
    split the phrasing ("the digit 7", "a handwritten seven", ...) is drawn from torch's generator each time a scan is read; in the others
    it depends on the index alone.
    """

    class_names = WORDS

    def __init__(self, split: str = "train", size: int = 32) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
        if size < 16:
            raise ValueError(f"size {size}: the scans are 8x8, choose 16 or more")
        self.split = split
        self.size = size
        scans, labels = load_scans()
        chosen = split_indices(labels, split)
        self.labels = labels[chosen]
        self.images = np.stack([enlarge(scan, size) for scan in scans[chosen]])  # (N, size, size, 3)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        digit = int(self.labels[index])
        phrasings = captions(digit)
        caption = draw_caption(phrasings) if self.split == "train" else phrasings[index % len(phrasings)]
        return {"image": self.images[index], "caption": caption, "class_label": digit, "human_label": WORDS[digit]}


def draw_caption(phrasings: list[str]) -> str:
    """One phrasing by torch's generator, every second time without opening and ending: a lone "nine" must not be a rarity."""
    plain = int(torch.randint(2, ()))
    return phrasings[int(torch.randint(PLAIN if plain else len(phrasings), ()))]


@cache
def captions(digit: int) -> list[str]:
    """Every phrasing of one digit, each with the word and with the numeral: "a handwritten seven", "a handwritten 7", ...

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
    """scikit-learn's digits -> scans (1797, 8, 8) float64 with ink 0..16, labels (1797,) int64."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits need scikit-learn, which the quickstart extra brings: pip install -e '.[quickstart]'"
        ) from error
    digits = load_digits()
    return digits.images, digits.target.astype(np.int64)


def split_indices(labels: np.ndarray, split: str) -> np.ndarray:
    """Indices of a split in ascending order: fixed, without random numbers, and with the same share of every digit."""
    held_out = np.zeros(len(labels), dtype=bool)
    for digit in np.unique(labels):
        held_out[np.flatnonzero(labels == digit)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]] = True
    return np.flatnonzero({"train": ~held_out, "held_out": held_out, "all": np.ones_like(held_out)}[split])


def enlarge(scan: np.ndarray, size: int) -> np.ndarray:
    """Ink 0..16 (8, 8) -> float32 (size, size, 3) in [-1, 1], bicubic, dark on white, with a margin of one pixel of the scan."""
    paper = Image.fromarray(np.round(255 * (1 - np.pad(scan, MARGIN) / 16)).astype(np.uint8))  # (10, 10)
    return to_array(paper.resize((size, size), Image.Resampling.BICUBIC).convert("RGB"))
