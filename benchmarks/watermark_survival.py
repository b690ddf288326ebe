"""Robustness of the invisible watermark: python benchmarks/watermark_survival.py (needs scikit-learn and scikit-image).

Every image is watermarked, modified, and read. The table gives, for each kind of image, the share of correct bits (0.5
by chance) and the share of images with all 136 bits correct. The photographs are those of scikit-learn and
scikit-image, or a folder's (--images).
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import numpy as np
from PIL import Image

from ldm.cli import Parser, run_command
from ldm.data.image import EXTENSIONS, load_image
from ldm.output.watermark import METHODS, Watermark

SIDE = 512  # pixels
SCIKIT_IMAGE = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
    "hubble_deep_field.jpg",
)


def resized(image: Image.Image, share: float) -> Image.Image:
    side = round(SIDE * share)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def encoded(image: Image.Image, kind: str, **options: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "PNG": lambda image: encoded(image, "PNG"),
    "JPEG, quality 95": lambda image: encoded(image, "JPEG", quality=95),
    "JPEG, quality 90": lambda image: encoded(image, "JPEG", quality=90),
    "JPEG, quality 80": lambda image: encoded(image, "JPEG", quality=80),
    "to 200 % and back": lambda image: resized(resized(image, 2.0), 1.0),
    "to 75 % and back": lambda image: resized(resized(image, 0.75), 1.0),
    "to 50 % and back": lambda image: resized(resized(image, 0.5), 1.0),
    "to 75 %": lambda image: resized(image, 0.75),
    "cut off: 64 rows below": lambda image: image.crop((0, 0, SIDE, SIDE - 64)),
    "cut off: 64 columns right": lambda image: image.crop((0, 0, SIDE - 64, SIDE)),
    "cut off: 10 pixels all around": lambda image: image.crop((10, 10, SIDE - 10, SIDE - 10)),
}


def whole_and_quarters(image: Image.Image) -> Iterator[Image.Image]:
    """Yield the central square of a photograph and its four quarters, each at 512x512 pixels."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    half = side // 2
    places = [(0, 0, side), *((x, y, half) for y in (0, half) for x in (0, half))]
    for x, y, width in places:
        yield resized(image.crop((left + x, top + y, left + x + width, top + y + width)), 1.0)


def photographs(folder: Path | None) -> list[Image.Image]:
    if folder is not None:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
        images = [load_image(path) for path in files]
    else:
        import skimage
        from sklearn.datasets import load_sample_images

        data = Path(skimage.__file__).parent / "data"
        images = [Image.fromarray(pixels) for pixels in load_sample_images().images]
        images += [load_image(data / name) for name in SCIKIT_IMAGE if (data / name).is_file()]
    if not images:
        raise ValueError(f"--images {folder}: no images in it")
    return [square for image in images for square in whole_and_quarters(image)]


def smooth(count: int) -> list[Image.Image]:
    """Return smooth color gradients: random 3x3 images, upscaled."""
    random = np.random.default_rng(0)
    colors = [Image.fromarray(random.integers(0, 256, (3, 3, 3), np.uint8)) for _ in range(count)]
    return [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in colors]


def noise(count: int) -> list[Image.Image]:
    return [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
        for seed in range(count)
    ]


def survival(method: str, images: Sequence[Image.Image]) -> tuple[dict[str, tuple[float, float]], float]:
    """Return {change: (share of correct bits, share of images with all correct)}, and the watermark's PSNR in dB."""
    watermark = Watermark(method)
    bits = 8 * len(watermark.content)
    marked = [watermark(image)[0] for image in images]
    errors = [np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2) for a, b in zip(images, marked, strict=True)]
    psnr = float(np.mean([10 * math.log10(255**2 / error) for error in errors]))
    table = {}
    for name, change in {"no mark": None, **CHANGES}.items():
        modified = images if change is None else [change(image) for image in marked]
        right = np.array([watermark.agreement(watermark.read(image)) for image in modified])
        table[name] = float(right.mean() / bits), float((right == bits).mean())
    return table, psnr


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="watermark_survival.py", description="Measure the robustness of the invisible watermark.")
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="photographs (default: those of scikit-learn and scikit-image)"
    )
    parser.add_argument(
        "--count", type=int, default=20, metavar="N", help="number of smooth images, and of noise images"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    opt = parser.parse_args(argv)
    kinds = {"photographs": photographs(opt.images), "smooth": smooth(opt.count), "noise": noise(opt.count)}
    print(
        "Correct bits / images with all bits correct; "
        + ", ".join(f"{len(images)} {kind}" for kind, images in kinds.items())
    )
    for method in METHODS:
        columns = {kind: survival(method, images) for kind, images in kinds.items()}
        print(f"\n| {method} | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
        for change in ("no mark", *CHANGES):
            cells = [
                f"{100 * table[change][0]:.0f} % / {100 * table[change][1]:.0f} %" for table, _ in columns.values()
            ]
            print(f"| {change} | {' | '.join(cells)} |")
        print(f"| *PSNR of the watermarked image* | {' | '.join(f'{psnr:.1f} dB' for _, psnr in columns.values())} |")


if __name__ == "__main__":
    sys.exit(run_command(main))
