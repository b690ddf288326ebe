"""Write the images and captions of a folder or table as tar shards: in parallel, resumable, the same bytes every time.

The layout is that of img2dataset: `00003.tar` holds `000030000.jpg`, `.txt` and `.json` for each sample. Next to it are
`00003_stats.json` and the index of ldm.data.shards. A shard has its name once it is complete.
"""

from __future__ import annotations

import io
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf
from tqdm import tqdm

from ldm.atomic import atomic_file, save_text
from ldm.data.captions import Row
from ldm.data.folder import ImageFolder, Item
from ldm.data.image import RESAMPLING, BadImageError, cover, load_image
from ldm.data.image_dataset import digest
from ldm.data.shards import Store, build_indices

PLAN, DATA_CONFIG = "shards.json", "data.yaml"
MAX_JPEG_SIDE = 65_500
_NUMBER = re.compile(r"[+-]?(?!0\d)(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)  # 007 is a name


class Selection(ImageFolder):
    """The images and captions of a folder or table, as ImageFolder selects them; the writer checks that they decode."""

    def __init__(self, root: str, **options: Any) -> None:
        self.fields: dict[str, dict[str, Any]] = {}  # of the first record of each image in a table
        super().__init__(root, **options)

    def _use_row(self, name: str, row: Row) -> None:
        self.fields.setdefault(name, {key: _plain(value) for key, value in row.fields.items()})

    @cached_property
    def several(self) -> bool:
        """True if an image has several captions."""
        return any(len(item.captions) > 1 for item in self.items)

    def _readable(self, items: list[Item]) -> list[Item]:
        return items


@dataclass(frozen=True)
class Layout:
    """Layout of the shards.

    samples: images in a shard. shuffled: in a fixed random order, so that each shard is a mixture of all.
    size: larger images are scaled so that their shorter side has this many pixels, and saved as JPEG of `quality`; None
    keeps every file as it is.
    """

    samples: int = 10_000
    shuffled: bool = True
    size: int | None = None
    quality: int = 95


class Summary(NamedTuple):
    """Totals of all shards."""

    shards: int
    written: int  # shards that this call wrote
    samples: int
    bytes: int
    sides: tuple[int, int, int]  # smallest, median and largest shorter side, in pixels
    skipped: dict[str, int]  # images by reason


class _Stopped(Exception):
    """Another shard failed, or the process is asked to end."""


def write_shards(selection: Selection, folder: Path, layout: Layout, workers: int) -> Summary:
    """Write the shards that are missing in `folder`, and their indices.

    Raises ValueError if it holds shards of other images or of another layout, BadImageError for an image that cannot be
    used unless the selection skips them.
    """
    order = np.arange(len(selection))
    if layout.shuffled:
        order = np.random.RandomState(0).permutation(order)  # always the same order: a killed run continues
    shards = [order[start : start + layout.samples] for start in range(0, len(order), layout.samples)]
    plan = {"images": len(selection), **selection.fingerprint, "fields": digest(list(selection.fields.items()))}
    plan |= {**asdict(layout), "on_error": selection.on_error, "min_size": selection.min_size}
    _check_plan(folder / PLAN, plan)
    paths = [folder / f"{number:05d}.tar" for number in range(len(shards))]
    missing = [number for number, path in enumerate(paths) if not (path.is_file() and _stats(path).is_file())]
    stop = threading.Event()
    total = sum(len(shards[number]) for number in missing)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=total, unit="image", leave=False, disable=None) as bar:

        def write(number: int) -> None:
            _write(selection, layout, paths[number], number, shards[number], stop, bar)

        try:
            for _ in pool.map(write, missing):
                pass
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    build_indices([str(path) for path in paths], Store())
    summary = _summary(selection, paths, len(missing))
    totals = {name: value for name, value in summary._asdict().items() if name != "written"}
    save_text(folder / PLAN, json.dumps({"plan": plan, **totals}, indent=2) + "\n")
    return summary


def write_config(selection: Selection, folder: Path, split: str, size: int) -> Path:
    """Write the YAML that trains on the shards in place of a config's dataset, unless it exists; return it.

    split: train, validation or test. size: side of the training images in pixels.
    """
    captions = None if not selection.captioned else "json.captions" if selection.several else "txt"
    params: dict[str, Any] = {"shards": str(folder.absolute()), "size": size, "captions": captions}
    if selection.caption_policy.missing == "empty":
        params["missing_caption"] = "empty"
    config = {"_replace_": True, "target": "ldm.data.webdataset.ImageShards", "params": params}
    if not (path := folder / DATA_CONFIG).exists():  # it may have been edited
        save_text(path, OmegaConf.to_yaml(OmegaConf.create({"data": {"params": {split: config}}})))
    return path


def _check_plan(path: Path, plan: Mapping[str, Any]) -> None:
    before: Any = None
    with suppress(OSError, ValueError):
        before = json.loads(path.read_text(encoding="utf-8"))["plan"]
    if before is None and (others := sorted(path.parent.glob("*.tar"))):
        raise ValueError(f"{path.parent} holds {others[0].name}, but no {PLAN}: choose another folder")
    if before is not None and before != plan:
        changed = "; ".join(_change(key, before.get(key), plan[key]) for key in plan if before.get(key) != plan[key])
        raise ValueError(f"{path.parent} holds other shards ({changed}): choose another folder, or remove it first")
    save_text(path, json.dumps({"plan": plan}, indent=2) + "\n")


_FLAGS = ("samples", "size", "quality", "min_size")  # entries of a plan that are named as their flags are


def _change(key: str, before: object, now: object) -> str:
    """Return what differs between two plans; most values are hashes, and are not shown."""
    if key in _FLAGS:
        return f"--{key} {before} there, {now} here"
    return {"images": f"{before} images there, {now} here", "shuffled": "--keep_order"}.get(key, f"another {key}")


def _write(
    selection: Selection, layout: Layout, path: Path, number: int, indices: np.ndarray, stop: threading.Event, bar: tqdm
) -> None:
    """Write one shard and its statistics."""
    from webdataset.writer import TarWriter  # an optional library, see ldm.data.shards

    digits = max(4, len(str(layout.samples - 1)))
    sides: list[int] = []
    skipped: dict[str, str] = {}
    with atomic_file(path) as temporary:
        with temporary.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for row, index in enumerate(indices):
                if stop.is_set():
                    raise _Stopped
                try:
                    sample, side = _sample(selection, layout, int(index), f"{number:05d}{row:0{digits}d}")
                except BadImageError as error:
                    if selection.on_error == "raise":
                        raise
                    skipped[selection.items[int(index)].name] = error.reason or str(error)
                else:
                    tar.write(sample)
                    sides.append(side)
                bar.update()
        stats = {"samples": len(sides), "bytes": temporary.stat().st_size, "sides": _counts(sides), "skipped": skipped}
        save_text(_stats(path), json.dumps(stats, indent=2) + "\n")


def _sample(selection: Selection, layout: Layout, index: int, key: str) -> tuple[dict[str, Any], int]:
    """Return the members of a sample and the shorter side of its image; BadImageError if it cannot be used."""
    name, captions = selection.items[index]
    path = selection.root / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadImageError(path, error.strerror or str(error)) from error
    image = load_image(path, selection.max_pixels, content=content)
    selection._check_size(path, *image.size)
    suffix, fields = path.suffix[1:].lower(), {"file_name": name, **selection.fields.get(name, {})}
    if layout.size is not None and min(image.size) > layout.size:
        fields |= {"original_width": image.width, "original_height": image.height}
        file, scaled = io.BytesIO(), cover(image, layout.size)
        if max(scaled) > MAX_JPEG_SIDE:
            reason = f"{scaled[0]}x{scaled[1]} pixels once scaled, a JPEG has at most {MAX_JPEG_SIDE:,}"
            raise BadImageError(path, reason)
        image = image.resize(scaled, RESAMPLING["lanczos"])
        image.save(file, "JPEG", quality=layout.quality)
        content, suffix = file.getvalue(), "jpg"
    fields |= {"width": image.width, "height": image.height}
    if selection.several:  # all images have the field, so that it can be trained on
        fields["captions"] = list(captions)
    sample: dict[str, Any] = {"__key__": key, suffix: content}
    if selection.captioned:
        sample["txt"] = captions[0].encode()
    text = json.dumps(fields, ensure_ascii=False).encode(errors="backslashreplace")  # of names that are not UTF-8
    return {**sample, "json": text}, min(image.size)


def _summary(selection: Selection, paths: list[Path], written: int) -> Summary:
    stats = [json.loads(_stats(path).read_text(encoding="utf-8")) for path in paths]
    sides: Counter[int] = Counter()
    for each in stats:
        sides.update({int(side): count for side, count in each["sides"].items()})
    ordered = np.repeat(sorted(sides), [sides[side] for side in sorted(sides)])
    reasons = [*selection.skipped.values(), *(reason for each in stats for reason in each["skipped"].values())]
    return Summary(
        len(paths),
        written,
        sum(each["samples"] for each in stats),
        sum(each["bytes"] for each in stats),
        (int(ordered[0]), int(ordered[len(ordered) // 2]), int(ordered[-1])) if len(ordered) else (0, 0, 0),
        dict(Counter(reasons).most_common()),
    )


def _stats(path: Path) -> Path:
    return path.with_name(f"{path.stem}_stats.json")


def _counts(values: list[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _plain(value: Any) -> Any:
    """Return a cell of a table as JSON can hold it: text of a number as one, a number that is not finite as null."""
    if not isinstance(value, str):
        return json.loads(json.dumps(value), parse_constant=lambda _: None)
    if _NUMBER.fullmatch(text := value.strip()):
        with suppress(ValueError):  # more digits than Python reads
            number = int(text) if text.lstrip("+-").isdigit() else float(text)
            if abs(number) < math.inf:
                return number
    return value
