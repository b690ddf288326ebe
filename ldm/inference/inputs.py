"""Files that the flags of the sampling scripts name: prompts, images, masks, depth maps, classes. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.config.suggest import closest, did_you_mean
from ldm.data.detectors import is_depth_model, level_ranges, make_detector
from ldm.data.image import EXTENSIONS, load_image, load_levels, to_array
from ldm.inference.requests import ControlRequest
from ldm.inference.settings import MAX_COUNT, round_to_multiple
from ldm.paths import expand_user, lines_of

logger = logging.getLogger(__name__)

BLACK = (0, 0, 0)


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file, one prompt each (empty lines included): UTF-8, or UTF-16 with a byte order mark.

    Only \\n, \\r\\n and \\r end a line. Raises ValueError if there are no prompts or another encoding.
    """
    flag = f"--from-file {path}"
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start}"
        raise ValueError(f"{flag}: not UTF-8 text ({byte}); save it as UTF-8, one prompt per line") from error
    except OSError as error:
        raise ValueError(f"{flag}: {error.strerror or error}; pass a text file with one prompt per line") from error
    if 3 * text.count("\0") > len(text):  # UTF-16 without a mark
        raise ValueError(f"{flag}: not UTF-8 text (zero bytes); save it as UTF-8, one prompt per line")
    prompts = lines_of(text)
    if not prompts[-1]:  # after the last line's end
        prompts.pop()
    if not any(map(str.strip, prompts)):
        raise ValueError(f"{flag}: no prompt in it; write one per line")
    blank = [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]
    if blank:
        logger.warning("%s: %d of %d prompts are empty, the first in line %d", flag, len(blank), len(prompts), blank[0])
    return prompts


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
    used = {file for pair in pairs for file in pair}
    others = sorted(file for file in folder.iterdir() if file.suffix.lower() in EXTENSIONS and file not in used)
    if pairs and others:
        text = "--indir %s: %d images without an x_mask.png are skipped, e.g. %s"
        logger.warning(text, folder, len(others), others[0].name)
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


def check_image(path: str | Path, flag: str, multiple: int = 1) -> Image.Image:
    """Load an image that a model starts from; warn about animations and fully transparent images.

    multiple: of pixels, that the model takes. Raises ValueError for a file that is not an image, or with a side below
    half of it or 2, which padding or resizing would invent.
    """
    image, least = load_image(path), max(2, (multiple + 1) // 2)
    if min(image.size) < least:
        near = "x".join(str(round_to_multiple(max(side, least), multiple)) for side in image.size)
        raise ValueError(
            f"{flag} {path}: {image.width}x{image.height} pixels; this model needs at least {least}x{least}, and "
            f"multiples of {multiple} are best: {near} is the nearest"
        )
    with Image.open(path) as file:
        if (frames := getattr(file, "n_frames", 1)) > 1 and file.format != "MPO":  # a camera's JPEG with a preview
            logger.warning("%s %s: an animation of %d frames; the first one is used", flag, path, frames)
    if image.getextrema() == ((255, 255),) * 3 and load_image(path, background=BLACK).getextrema() == ((0, 0),) * 3:
        logger.warning("%s %s: fully transparent; it is taken as white", flag, path)
    return image


def load_mask(path: str | Path) -> Image.Image:
    """Load an inpainting mask -> mode L, 255 where pixels are generated, else 0.

    Generated is what is at least half white; white is 1 in a file whose largest value is 1, 255 up to 255, else 65535.
    Transparent parts are not generated. Raises ValueError, with the largest value, if that leaves nothing.
    """
    return _hole(path, load_levels(path, background=BLACK))


def _hole(path: str | Path, levels: np.ndarray) -> Image.Image:
    highest = levels.max()
    white = 1 if highest <= 1 else 255 if highest <= 255 else 65535
    hole = levels >= white / 2
    if not hole.any():
        text = f"mask {path}: its largest value is {highest:g}, so nothing would be inpainted: make the hole white"
        if load_levels(path).max() > highest:
            text += " on black (transparent parts are kept)"
        raise ValueError(text)
    return Image.fromarray(np.where(hole, np.uint8(255), np.uint8(0)))


def check_pairs(pairs: Sequence[tuple[Path, Path]], multiple: int = 1) -> None:
    """Raise ValueError for files that are not images, images smaller than `multiple`, and unusable masks.

    Warns about masks that look inverted or like photos, and about those of 0 and 1.
    """
    inverted, grey, binary = list[str](), list[str](), list[str]()
    for path, mask in pairs:
        levels = load_levels(mask, background=BLACK)
        image, hole = check_image(path, "image", multiple), _hole(mask, levels)
        if image.size != hole.size:
            sizes = "{} has {}x{} pixels, {} has {}x{}: sizes must match".format(mask, *hole.size, path, *image.size)
            turned = " (is only one of them rotated by EXIF?)" if image.size == hole.size[::-1] else ""
            raise ValueError(sizes + turned)
        if (share := np.asarray(hole).mean() / 255) > 0.5:
            inverted.append(f"{share:.0%} of {mask}")
        between = np.abs(2 * levels / levels.max() - 1) < 0.8  # neither black nor white
        if between.mean() > 0.5:
            grey.append(str(mask))
        if set(np.unique(levels)) <= {0.0, 1.0}:
            binary.append(str(mask))
    for masks, text in (
        (inverted, "are mostly white (%s); white is generated: if they are inverted, swap black and white"),
        (grey, "are mostly grey (%s); they are cut at half white: are they masks?"),
        (binary, "have only the values 0 and 1 (%s); 1 is taken as white"),
    ):
        if masks:
            logger.warning(f"%d of %d masks {text}", len(masks), len(pairs), masks[0])


def find_depth(path: str, size: tuple[int, int]) -> np.ndarray | Path:
    """The depth map in a file, float32 (H, W), or the folder of a depth estimator.

    size: width and height of the image; warns if the map has other proportions, or is the same everywhere.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"--depth {path}: no config.json in it; pass a depth map or a folder with transformers' DPT"
            )
        return folder
    depth = load_levels(path)
    height, width = depth.shape
    if abs(width / height - size[0] / size[1]) > 0.02 * size[0] / size[1]:
        text = "--depth %s: %dx%d pixels, and the image has %dx%d: the map is stretched"
        logger.warning(text, path, width, height, *size)
    if depth.min() == depth.max():
        logger.warning("--depth %s: the value is %g everywhere, so the map has no effect", path, depth.max())
    return depth


def make_hints(images: Sequence[Image.Image], request: ControlRequest, depth_model: str | None) -> list[Image.Image]:
    """The hints of a checked request's control images, at its size, by its detectors; warns about stretched images."""
    height, width = request.size
    if "depth" in request.detector and not is_depth_model(depth_model):
        problem = f"--depth-model {depth_model}: no config.json in it" if depth_model else "--detector depth"
        raise ValueError(f"{problem}; pass --depth-model DIR with transformers' DPT (Intel/dpt-hybrid-midas)")
    hints = []
    for image, name in zip(images, request.detector, strict=True):
        if not 1 / 1.1 < (image.width * height) / (image.height * width) < 1.1:
            text = "a control image of %dx%d pixels is stretched to %dx%d, the size by the first one"
            logger.warning(text, *image.size, width, height)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        hints.append(hint := make_detector(name, request.canny, depth_model)(image))
        _check_hint(hint, name, request)
    return hints


def _check_hint(hint: Image.Image, detector: str, request: ControlRequest) -> None:
    """Raise ValueError for a hint of 0 and 1, warn about one that is the same everywhere."""
    ranges = level_ranges(hint)
    if (highest := max(high for _, high in ranges)) == 1:
        raise ValueError("--control-image: its largest value is 1 of 255, nearly black; save it with 255 for white")
    if all(low == high for low, high in ranges):
        thresholds = " ".join(map(str, request.canny))
        found = f"canny found no edges (--canny {thresholds}: lower values find more)" if detector == "canny" else ""
        logger.warning("%s; the hint controls nothing", found or f"a control image is {highest} of 255 everywhere")


def parse_batch(text: str) -> tuple[str, list[int] | None]:
    """(split, indices) of `--batch`: `train:0..7` (both ends included), `test:0,2,5..9`; None for a split alone."""
    split, colon, part = text.partition(":")
    if split and not colon:
        return split, None
    indices: list[int] = []
    for word in part.split(","):
        first, dots, last = word.strip().partition("..")
        if not first.isdecimal() or (dots and not last.isdecimal()) or int(last or first) >= MAX_COUNT:
            indices.clear()
            break
        indices.extend(range(int(first), int(last or first) + 1))
    if not split or not indices:
        raise ValueError(f"--batch {text!r}: expected a split and indices, e.g. validation:0..7 or train:3,5")
    return split, indices


def parse_conditions(words: Sequence[str]) -> list[dict[str, Any]]:
    """Samples from `--condition` words KEY=VALUE: images, .npy arrays, whole numbers or texts by the key in the batch.

    A key that is repeated has a value for each sample; one that is not, the same for all.
    """
    values: dict[str, list[Any]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise ValueError(f"--condition {word!r}: expected KEY=VALUE, e.g. caption='a cat' or LR_image=small.png")
        values.setdefault(key, []).append(_condition_value(key, value))
    count = max(map(len, values.values()), default=0)
    for key, given in values.items():
        if len(given) not in (1, count):
            raise ValueError(f"--condition {key}: {len(given)} values, others have {count}; pass one, or one for each")
    return [{key: given[k % len(given)] for key, given in values.items()} for k in range(count)]


def _condition_value(key: str, text: str) -> Any:
    path = expand_user(text)
    if path.suffix.lower() in {*EXTENSIONS, ".npy"}:
        if not path.is_file():
            raise FileNotFoundError(f"--condition {key}={text}: no such file")
        if path.suffix.lower() != ".npy":
            return to_array(load_image(path))
        try:
            array = np.load(path, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"--condition {key}={text}: not an array: {error}") from error
        return array.astype(np.float32) if array.dtype.kind == "f" else array
    return int(text) if text.isdecimal() else text


def parse_classes(words: Sequence[str], names: Sequence[str] = ()) -> tuple[int, ...]:
    """Class numbers on the command line: `207`, `1,2,3`, `10-19` (both ends included) and `names`, in the order given.

    A word that could be both is a number.
    """
    classes: list[int] = []
    numbers = {name: number for number, name in enumerate(names)}
    for word in words:
        for part in [word] if word in numbers else map(str.strip, word.split(",")):  # a name may have a comma
            first, dash, last = part.partition("-")
            if first.isdecimal() and (not dash or last.isdecimal()):
                if dash and int(last) < int(first):
                    raise ValueError(f"--classes {part}: the range is reversed")
                if int(last or first) >= MAX_COUNT:
                    raise ValueError(f"--classes {part}: expected classes below {MAX_COUNT:,}")
                classes.extend(range(int(first), int(last or first) + 1))
            elif part in numbers:
                classes.append(numbers[part])
            elif names:
                near = did_you_mean(part, names if len(names) <= 20 else filter(None, [closest(part, names)]))
                raise ValueError(f"--classes {part!r}: neither a number nor the name of a class{near}")
            else:
                raise ValueError(f"--classes {part!r}: expected class numbers and ranges, e.g. 207 or 1,2,10-19")
    return tuple(classes)
