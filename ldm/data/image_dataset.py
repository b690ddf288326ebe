"""The base of datasets of images, with captions if they have any: scaling, crop, flip, keys, unusable images."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.config.types import PositiveInt, Probability
from ldm.data.base import DataConfigError, check_choice
from ldm.data.buckets import Buckets, assign, bucket_order, summary, too_small
from ldm.data.captions import CaptionPolicy, PromptTemplates
from ldm.data.image import (
    MAX_PIXELS,
    RESAMPLING,
    BadImageError,
    Size,
    View,
    cover,
    crop_box,
    height_and_width,
    image_size,
    to_array,
)
from ldm.data.order import epoch_order, usable_cpus

logger = logging.getLogger(__name__)

_NEXT, _FURTHER = 3, 17  # images that are tried in the place of one that became unusable: after it, and anywhere


class ImageDataset(Dataset):
    """Images that a subclass finds and loads; it sets `captioned` before it calls this constructor.

    An item holds `image` float32 (H, W, 3) in [-1, 1] and `file_path_`; with captions also `caption`, repeated as
    `txt`.

    size: images are scaled, keeping their proportions, to cover this (a side, or [height, width]); None keeps images
    that cover crop_size at their own size. crop_size: the size of the crop (None means `size`), central or, with
    random_crop, at a random position.
    flip_p: probability of a horizontal flip. interpolation: bicubic, lanczos, bilinear, box or nearest; antialiased
    when shrinking.

    missing_caption (blank counts as missing): raise, skip the image, or use an empty caption. long_caption, for more
    than max_caption_chars: truncate (with one warning), raise or skip. An image may have several captions: each sample
    takes a random one.
    templates: captions such as "a photo of {}", of which each sample takes a random one; {} stands for `subject` or, if
    that is None, for the caption of the image. subject: the caption of all images if there are no templates.

    on_error: raise stops at the first unusable file, skip leaves it out. An image that becomes unusable later is
    replaced by the next one. min_size: images with a shorter side below this are unusable (1x1 placeholders), and those
    above max_pixels. image_key, caption_key: names in the batch (Stable Diffusion's YAML uses jpg and txt).

    buckets: train on sizes of several proportions, see Buckets, with an area of at most `size` x `size`; all images of
    a batch have one size (ldm.data.buckets). An item then also holds `original_size`, `target_size` (height, width) and
    `crop_top_left`, the place of the crop in the scaled (and flipped) image, each int64 (2,) in pixels.
    """

    captioned: bool

    def __init__(
        self,
        size: Size | None = 256,
        crop_size: Size | None = None,
        random_crop: bool = False,
        flip_p: Probability = 0.0,
        interpolation: str = "bicubic",
        missing_caption: str = "raise",
        max_caption_chars: PositiveInt = 4000,
        long_caption: str = "truncate",
        templates: Sequence[str] = (),
        subject: str | None = None,
        on_error: str = "raise",
        min_size: PositiveInt = 2,
        max_pixels: PositiveInt = MAX_PIXELS,
        image_key: str = "image",
        caption_key: str = "caption",
        buckets: Annotated[Mapping[str, Any], "ldm.data.buckets.Buckets"] | None = None,
    ) -> None:
        check_choice("interpolation", interpolation, RESAMPLING)
        check_choice("missing_caption", missing_caption, ("raise", "skip", "empty"))
        check_choice("long_caption", long_caption, ("truncate", "raise", "skip"))
        check_choice("on_error", on_error, ("raise", "skip"))
        self.size, self.crop_size = _sizes(size, crop_size)
        self.random_crop, self.flip_p, self.interpolation = random_crop, flip_p, interpolation
        self.on_error, self.min_size, self.max_pixels = on_error, min_size, max_pixels
        self.image_key, self.caption_key = image_key, caption_key
        self.caption_policy = CaptionPolicy(missing_caption, max_caption_chars, long_caption)
        self.prompts = PromptTemplates(templates, subject, self.captioned)
        self.skipped: dict[str, str] = {}  # name -> reason
        self.buckets, self.bucket_sizes = _buckets(buckets, size, crop_size)
        self.batch = 0  # samples of all ranks for which the buckets were chosen
        self.bucket_of = np.zeros(0, np.int64)  # the row of `bucket_sizes` of each image

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def file_of(self, index: int) -> Path | str:
        """Return the file of a sample."""

    @abstractmethod
    def _load(self, index: int) -> Image.Image:
        """Return an image as 8-bit RGB; BadImageError if it is unusable."""

    @abstractmethod
    def _captions(self, index: int) -> Sequence[str]:
        """Return the captions of an image."""

    def captions(self) -> Iterator[str]:
        """Yield the captions of all images, as they are before templates; none for images without captions."""
        return (caption for index in range(len(self) if self.captioned else 0) for caption in self._captions(index))

    @cached_property
    def sizes(self) -> np.ndarray:
        """Width and height of each upright image, from its header -> int32 (N, 2)."""
        files = [self.file_of(index) for index in range(len(self))]
        with ThreadPoolExecutor(usable_cpus()) as pool:
            found = pool.map(image_size, files)
            bar = tqdm(found, "reading image sizes", len(files), leave=False, delay=3, disable=None)
            return np.array(list(bar), np.int32).reshape(-1, 2)

    def set_batch(self, batch: int) -> None:
        """Choose the bucket of each image for batches of this many samples of all ranks; before data workers start."""
        if self.buckets is None or batch == self.batch:
            return
        small = np.flatnonzero(too_small(self.sizes, self.bucket_sizes))
        if len(small) and not self.buckets.upscale:
            first = "x".join(map(str, self.sizes[small[0]]))
            problem = f"{len(small)} images are smaller than all sizes, first {self.file_of(small[0])}: {first}"
            smaller = "min_side" if self.bucket_sizes.min() > self.buckets.step else "step"
            advice = f"set {{param}}.upscale to true or {{param}}.{smaller} to less, or leave them out by min_size "
            advice += f"{self.bucket_sizes.max(axis=1).min()} and on_error skip"
            raise DataConfigError("buckets", asdict(self.buckets), problem, advice)
        self.batch = batch
        self.bucket_of = assign(self.sizes, self.bucket_sizes, batch, self.buckets.upscale)

    @property
    def bucket_text(self) -> str:
        """The sizes in use and their images, for the log; empty without buckets, and before `set_batch`."""
        return summary(self.bucket_sizes.tolist(), self.bucket_of, self.batch) if self.buckets and self.batch else ""

    def order(self, seed: int, epoch: int, batch: int, shuffle: bool) -> np.ndarray:
        """Return the indices of an epoch -> (N,) int64; with buckets, each batch of all ranks has one size."""
        order = self.sample_order(seed, epoch, shuffle)
        if self.buckets is None:
            return order
        self.set_batch(batch)
        return bucket_order(order, self.bucket_of, batch)

    @property
    def bucket_fingerprint(self) -> dict[str, int | str]:
        """The part of a `fingerprint` that tells buckets apart; empty without them."""
        if self.buckets is None:
            return {}
        buckets = digest([asdict(self.buckets), self.bucket_sizes.tolist()])
        return {"buckets": buckets, "sizes": digest(self.sizes.tobytes())}

    def sample_order(self, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """Return the indices of an epoch without buckets -> (N,) int64."""
        return epoch_order(len(self), seed, epoch, shuffle)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._sample(index)
        except BadImageError as error:
            if self.on_error == "raise":
                advice = "repair or remove it, or set on_error to skip"
                raise BadImageError(error.path, f"{error.reason}; {advice}") from error
            return self._replacement(index, error)

    def _replacement(self, index: int, error: BadImageError) -> dict[str, Any]:
        """Return a sample that can be read, for an image that became unusable after it was checked.

        It is one of the next ones or, as all of these may be in a lost shard or folder, one of some of all others.
        """
        if error.path not in self.skipped:
            self.skipped[error.path] = error.reason or str(error)
            logger.warning("%s; the next image takes its place (%d skipped)", error, len(self.skipped))
        alike = np.arange(len(self))
        if self.buckets is not None:
            self.set_batch(self.batch or 1)
            alike = np.flatnonzero(self.bucket_of == self.bucket_of[index])
        others = np.roll(alike, -int(np.searchsorted(alike, index)) - 1)[:-1]
        if len(others) > _NEXT + _FURTHER:
            spread = np.linspace(_NEXT, len(others) - 1, _FURTHER).astype(np.int64)
            others = others[[*range(_NEXT), *spread]]
        for other in others.tolist():
            with suppress(BadImageError):
                return self._sample(other)
        tried = f"nor can {len(others)} other images be read"
        raise BadImageError(
            error.path, f"{error.reason}; {tried}: is {Path(error.path).parent} still there?"
        ) from error

    def _sample(self, index: int) -> dict[str, Any]:
        sample = {**self._values(self._load(index), index), "file_path_": str(self.file_of(index))}
        if self.captioned or self.prompts:
            captions = self._captions(index)
            caption = random.choice(captions) if len(captions) > 1 else "".join(captions)
            caption = self.prompts(caption)
            sample |= {"caption": caption, "txt": caption, self.caption_key: caption}
        return sample

    def _unusable(self, what: str, reason: str) -> None:
        """Leave out a file or record, or raise DataConfigError with `on_error` raise."""
        if self.on_error == "raise":
            raise DataConfigError("on_error", "raise", f"{what}: {reason}", "repair it, or set {param} to skip")
        self.skipped[what] = reason

    def _check_size(self, path: str | Path, width: int, height: int) -> None:
        """Raise BadImageError for an image below min_size."""
        if min(width, height) < self.min_size:
            raise BadImageError(path, f"{width}x{height} pixels, below min_size {self.min_size}")

    def _values(self, image: Image.Image, index: int) -> dict[str, Any]:
        """Return the entries of a sample that come from its image."""
        view = self._view(image, index)
        return {**self._views(image, view, index), **self._geometry(image, view)}

    def _views(self, image: Image.Image, view: View, index: int) -> dict[str, Any]:
        """Return the entries of a sample in a view of its image; subclasses override this."""
        return {self.image_key: to_array(view.apply(image, self.interpolation))}

    def _geometry(self, image: Image.Image, view: View) -> dict[str, Any]:
        """Return the sizes and the crop of a sample, as SDXL's embeddings take them (arXiv 2307.01952); see `buckets`.

        Empty without buckets.
        """
        if self.buckets is None:
            return {}
        left, top, right, bottom = view.box
        corner = top, view.scaled[0] - right if view.mirrored else left
        size = bottom - top, right - left
        pairs = {"original_size": image.size[::-1], "crop_top_left": corner, "target_size": size}
        return {name: np.array(pair) for name, pair in pairs.items()}

    def _view(self, image: Image.Image, index: int) -> View:
        """Return the scaling, crop and flip of a sample, random as configured."""
        target, crop_size = self.size, self.crop_size
        if self.buckets is not None:
            self.set_batch(self.batch or 1)
            height, width = self.bucket_sizes[self.bucket_of[index]].tolist()
            target = crop_size = height, width
        if target is None and (image.height < self.crop_size[0] or image.width < self.crop_size[1]):
            target = self.crop_size
        scaled = cover(image, target) if target is not None else image.size
        box = crop_box(scaled, crop_size, self.random_crop)
        return View(scaled, box, bool(self.flip_p) and random.random() < self.flip_p)


def _buckets(
    section: Mapping[str, Any] | None, size: Size | None, crop_size: Size | None
) -> tuple[Buckets | None, np.ndarray]:
    """Return the section `buckets` and its sizes, (height, width), int64 (K, 2)."""
    if section is None:
        return None, np.zeros((0, 2), np.int64)
    if not isinstance(size, int) or crop_size not in (None, size):
        param, value = ("size", size) if not isinstance(size, int) else ("crop_size", crop_size)
        advice = "set size to one number, the side of the square with the largest area, and crop_size to null"
        raise DataConfigError(param, value, "cannot be used with buckets", advice)
    try:
        buckets = Buckets(**section)
        return buckets, buckets.sizes(size)
    except (TypeError, ValueError) as error:
        raise DataConfigError("buckets", dict(section), str(error), "change {param}, or size") from error


def digest(content: object) -> str:
    """Return a hash of bytes, or of anything that JSON can hold, for a dataset's `fingerprint`."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _sizes(size: Size | None, crop_size: Size | None) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """Return the (height, width) that an image is scaled to cover, and the (height, width) of the crop."""

    def pair(param: str, value: Size | None) -> tuple[int, int]:
        try:
            if value is None:
                raise ValueError("not set")
            return height_and_width(value)
        except (TypeError, ValueError) as error:
            advice = "set {param} to a positive integer or [height, width]"
            raise DataConfigError(param, value, "not a size", advice) from error

    if size is None and crop_size is not None:
        return None, pair("crop_size", crop_size)
    scaled = pair("size", size)
    kept = scaled if crop_size is None else pair("crop_size", crop_size)
    if kept[0] > scaled[0] or kept[1] > scaled[1]:
        raise DataConfigError("crop_size", crop_size, f"larger than size {size}", f"set {{param}} to at most {size}")
    return scaled, kept
