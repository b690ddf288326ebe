"""Save images as they are generated, and report: the end of every sampling script."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ldm.output.images import GeneratedImage, NamedOutput, Output
from ldm.output.sample_array import SampleArray
from ldm.visualize import grid

MAX_GRID = 64  # samples in the grid of a long run


def write_images(images: Iterable[GeneratedImage], output: Output, opt: Namespace) -> None:
    """Save images as they are generated, then their grid, and report."""
    start, files, kept, count = time.perf_counter(), [], [], 0
    for image in map(output.checked, images):
        count += 1
        if not opt.skip_save:
            files.append(output.save_sample(image))
        if not opt.skip_grid:
            kept.append(image)
    seconds = time.perf_counter() - start
    if kept:
        captions = [image.info["prompt"] for image in kept] if opt.captions else None
        files.append(output.save_grid(grid_of(kept, opt.n_rows or opt.n_samples, captions)))
    report(count, seconds, files)


def write_named(images: Iterable[tuple[Path, GeneratedImage]], count: int, output: NamedOutput) -> None:
    """Save each image under the name of its source, and report."""
    start, files = time.perf_counter(), []
    with tqdm(total=count, desc="images", unit="image") as bar:
        for source, image in images:
            files.append(output.save(image, source.stem))
            bar.update()
    report(count, time.perf_counter() - start, files)


def write_samples(
    images: Iterable[GeneratedImage], count: int, output: Output, folder: Path, columns: int | None, skip_grid: bool
) -> None:
    """Save samples as numbered files and, without watermark, in one array in `folder`, and report.

    A grid shows the first ones, with their classes; columns: None for a square grid.
    """
    start, files, array = time.perf_counter(), [], SampleArray(folder, count)
    kept: list[GeneratedImage] = []
    try:
        for image in map(output.checked, images):
            array.append(image.image, image.info["class"])
            files.append(output.save_sample(image))
            if not skip_grid and count > 1 and len(kept) < MAX_GRID:
                kept.append(image)
        files.append(array.finish())
    finally:
        array.close()
    if kept:
        classes = [str(image.info.get("class_name", image.info["class"])) for image in kept]
        captions = None if kept[0].info["class"] is None else classes
        files.append(output.save_grid(grid_of(kept, columns, captions)))
    report(count, time.perf_counter() - start, files)


def write_conditional(
    results: Iterable[tuple[GeneratedImage, dict[str, Image.Image]]], n_samples: int, output: Output, skip_grid: bool
) -> None:
    """Save samples, then a grid with a row for each sample: its input, its conditions, its `n_samples` images."""
    start, files, count = time.perf_counter(), [], 0
    rows: dict[int, tuple[dict[str, Image.Image], list[GeneratedImage]]] = {}
    for image, shown in results:
        count += 1
        image = output.checked(image)
        files.append(output.save_sample(image))
        row = image.info["image_index"] // n_samples
        if not skip_grid and row < MAX_GRID:
            rows.setdefault(row, (shown, []))[1].append(image)
    seconds = time.perf_counter() - start
    if rows:
        files.append(output.save_grid(_conditional_grid(list(rows.values()))))
    report(count, seconds, files)


def _conditional_grid(rows: Sequence[tuple[dict[str, Image.Image], list[GeneratedImage]]]) -> GeneratedImage:
    cells: list[Image.Image] = []
    captions: list[str] = []
    for shown, images in rows:
        cells += [*shown.values(), *(image.image for image in images)]
        names = {"conditioning": "condition"}  # a word that fits below 64 pixels
        captions += [*(names.get(name, name) for name in shown), *["sample"] * len(images)]
    side = max(max(cell.size) for cell in cells)
    for k, cell in enumerate(cells):  # what the network sees may be as small as the latent
        scale = side // max(cell.size)
        cells[k] = cell.resize((cell.width * scale, cell.height * scale), Image.Resampling.NEAREST)
    generated = [image for _, images in rows for image in images]
    pixels = grid(cells, captions, len(cells) // len(rows), padding=12)
    return grid_of(generated, None, None)._replace(image=pixels)


def report(count: int, seconds: float, files: Sequence[Path]) -> None:
    """Print the number of images, the time and the files."""
    each = "" if count == 1 else f", {seconds / count:.2f} s each"
    print(f"{count} image{'s' * (count != 1)} in {seconds:.1f} s{each}")
    names = [str(file) for file in files]
    print("\n".join(names if len(names) <= 8 else [*names[:3], f"... {len(names) - 5} more", *names[-2:]]))


def grid_of(images: list[GeneratedImage], columns: int | None, captions: list[str] | None) -> GeneratedImage:
    """All images in the published grid or, with captions, in a wider one on white."""
    layout: dict[str, Any] = {"captions": captions, "padding": 12} if captions else {"background": "black"}
    each = {"prompt": "prompts", "class": "classes"}
    lists = {key: [image.info[name] for image in images] for name, key in each.items() if name in images[0].info}
    shared = {name: x for name, x in images[0].info.items() if all(image.info[name] == x for image in images)}
    flagged = [image.info.get("flagged") for image in images]
    info = {**shared, **lists, "flagged": None if None in flagged else any(flagged)}
    return GeneratedImage(
        grid([image.image for image in images], columns=columns, **layout), info, checked=all(i.checked for i in images)
    )
