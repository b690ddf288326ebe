"""Files that the flags of the sampling scripts name: prompts, images, masks, depth maps, classes. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm.data.image import EXTENSIONS, load_depth
from ldm.data.image import load_image as load_image


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file, one prompt each (empty lines included); raise ValueError if it has none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--from-file {path}: not UTF-8 text (byte {error.start}); save it as UTF-8, one prompt per line"
        ) from error
    except OSError as error:
        raise ValueError(
            f"--from-file {path}: {error.strerror or error}; pass a text file with one prompt per line"
        ) from error
    if not text:
        raise ValueError(f"--from-file {path}: the file is empty; write one prompt per line")
    return text.removesuffix("\n").split("\n")  # `splitlines` would also split at U+2028, U+0085 and form feeds


def find_pairs(folder: str | Path) -> list[tuple[Path, Path]]:
    """(image, mask) for every `x_mask.png` of a folder, sorted; the image is `x.png` or has another extension."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--indir {folder}: no such folder; it must hold pairs x.png, x_mask.png")
    pairs = []
    for mask in sorted(folder.glob("*_mask.png")):
        stem = mask.name.removesuffix("_mask.png")
        names = [f"{stem}{extension}" for extension in (".png", *sorted(EXTENSIONS - {".png"}))]
        image = next((folder / name for name in names if (folder / name).is_file()), None)
        if image is None:
            raise FileNotFoundError(f"{mask}: its image {folder / names[0]} is missing")
        pairs.append((image, mask))
    if not pairs:
        raise FileNotFoundError(f"--indir {folder}: no x_mask.png found; a mask is white where x.png is inpainted")
    return pairs


def one_pair(image: str | None, mask: str | None) -> list[tuple[Path, Path]]:
    """(image, mask) of the flags that name one pair."""
    for flag, given in (("--init-img", image), ("--mask", mask)):
        if not given:
            raise ValueError(
                f"{flag}: pass both, e.g. --init-img photo.png --mask mask.png, or a folder of pairs with --indir"
            )
        if not Path(given).is_file():
            raise FileNotFoundError(f"{flag} {given}: no such file")
    return [(Path(image or ""), Path(mask or ""))]


def check_pairs(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Raise ValueError for files that are not images, and for a mask of another size than its image."""
    for image, mask in pairs:
        size, mask_size = load_image(image).size, load_image(mask).size
        if size != mask_size:
            raise ValueError(
                "{} has {}x{} pixels, {} has {}x{}: sizes must match".format(mask, *mask_size, image, *size)
            )


def find_depth(path: str) -> np.ndarray | Path:
    """The depth map in a file, float32 (H, W), or the folder of a depth estimator."""
    folder = Path(path)
    if not folder.is_dir():
        return load_depth(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"--depth {path}: no config.json in it; pass a depth map or a folder with transformers' DPT"
        )
    return folder


def parse_classes(words: Sequence[str]) -> tuple[int, ...]:
    """Class numbers on the command line: `207`, `1,2,3` and `10-19` (both ends included), in the order given."""
    classes: list[int] = []
    for word in ",".join(words).split(","):
        first, dash, last = word.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--classes {word!r}: expected class numbers and ranges, e.g. 207 or 1,2,10-19")
        if dash and int(last) < int(first):
            raise ValueError(f"--classes {word}: the range is reversed")
        classes.extend(range(int(first), int(last or first) + 1))
    return tuple(classes)
