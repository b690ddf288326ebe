"""Aspect-ratio buckets: image sizes of several proportions, and batches in which all images have one size.

A sample has the same size in every epoch. It belongs to the bucket that keeps most of its image (`kept`). Of each
bucket the samples beyond whole batches, those that fit it worst, are sorted by their ratio and form batches with those
of the other buckets, each in the size that keeps most of its images. So all batches of an epoch are full, except
one if the number of samples is not a multiple of the batch, and every sample is used once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldm.config.types import PositiveInt

_COMPARED = 1 << 20  # images times sizes that are compared at once, in arrays of 8 MB


@dataclass(frozen=True)
class Buckets:
    """The section `buckets` of a dataset of images, whose `size` is the side of the square with the largest area.

    step: sides are multiples of it. min_side, max_side: limits of the sides; None is half and twice `size`, rounded to
    steps. max_ratio: limit of the longer side divided by the shorter one. upscale: enlarge images that are smaller than
    all sizes of the largest area; otherwise these get sizes of a smaller area.
    """

    step: PositiveInt = 64
    min_side: PositiveInt | None = None
    max_side: PositiveInt | None = None
    max_ratio: float = 2.0
    upscale: bool = False

    def sizes(self, side: int) -> np.ndarray:
        """Return the (height, width) of the buckets -> int64 (K, 2). Raises ValueError if there are none."""
        least = self.min_side or max(self.step, side // 2 // self.step * self.step)
        most = self.max_side or side * 2
        sides = np.arange(-(-least // self.step) * self.step, most + 1, self.step)
        sizes = np.stack(np.meshgrid(sides, sides, indexing="ij"), axis=-1).reshape(-1, 2)
        ratio = sizes.max(axis=1, initial=1) / sizes.min(axis=1, initial=1 << 40)
        sizes = sizes[(sizes.prod(axis=1) <= side**2) & (ratio <= self.max_ratio)]
        if not len(sizes):
            raise ValueError(f"no sides from {least} to {most} in steps of {self.step} have an area of {side}x{side}")
        return sizes


def kept(images: np.ndarray, sizes: np.ndarray, upscale: bool) -> np.ndarray:
    """Return how much of images (N, 2), width and height, is kept by sizes (K, 2), height and width -> (N, K).

    It is the number of pixels of the size, times the square of the fraction of the image's area inside the crop; -inf
    for sizes that enlarge the image, unless `upscale`.
    """
    width, height = images[:, :1], images[:, 1:]
    scale = np.maximum(sizes[:, 0] / height, sizes[:, 1] / width)
    pixels = sizes.prod(axis=1).astype(np.float64)
    values = pixels * (pixels / (scale**2 * height * width)) ** 2
    return values if upscale else np.where(scale > 1, -np.inf, values)


def too_small(images: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return whether every size (K, 2), height and width, enlarges an image (N, 2), width and height -> bool (N,)."""
    fits = np.zeros(len(images), bool)
    for height, width in sizes:
        fits |= (images[:, 0] >= width) & (images[:, 1] >= height)
    return ~fits


def assign(images: np.ndarray, sizes: np.ndarray, batch: int, upscale: bool) -> np.ndarray:
    """Return the row of `sizes` of each image -> int64 (N,), for batches of this many samples; see the module.

    images: (N, 2), width and height; each must have a size that does not enlarge it, unless `upscale`.
    """
    step = max(1, _COMPARED // len(sizes))
    parts = [images[k : k + step] for k in range(0, len(images), step)]
    best = np.concatenate([kept(part, sizes, upscale).argmax(axis=1) for part in parts])
    fraction = images[:, 0] / images[:, 1] * sizes[best, 0] / sizes[best, 1]
    fit = np.minimum(fraction, 1 / fraction)  # of the image's area that is inside the crop
    left = []
    for bucket in np.unique(best):
        members = np.flatnonzero(best == bucket)
        left.append(members[np.argsort(fit[members], kind="stable")][: len(members) % batch])
    rest = np.concatenate(left)
    rest = rest[np.argsort(images[rest, 0] / images[rest, 1], kind="stable")]
    for k in range(0, len(rest), batch):
        group = rest[k : k + batch]
        values = kept(images[group], sizes, upscale)
        best[group] = (values / values.max(axis=1, keepdims=True)).sum(axis=0).argmax()
    return best


def bucket_order(order: np.ndarray, buckets: np.ndarray, batch: int) -> np.ndarray:
    """Return the indices of an epoch, rearranged so that each batch has one bucket -> int64 (N,).

    order: the indices of the epoch. buckets: (N,), that of each sample; all but one consist of whole batches. Batches
    are in the order in which they become full, and the one that does not is last.
    """
    place = np.argsort(buckets[order], kind="stable")  # places in the epoch, by bucket
    counts = np.bincount(buckets)
    tail = int(counts.sum()) % batch
    uneven = np.flatnonzero(counts % batch)
    if len(uneven) > 1:
        raise ValueError(f"{len(uneven)} buckets do not consist of batches of {batch}")
    last = np.zeros(0, np.int64)
    if tail:
        end = int(counts[: uneven[0] + 1].sum())
        place, last = np.delete(place, np.s_[end - tail : end]), place[end - tail : end]
    batches = place.reshape(-1, batch)
    batches = batches[np.argsort(batches[:, -1], kind="stable")]
    return order[np.concatenate([batches.ravel(), last])]


def summary(sizes: Sequence[tuple[int, int]], buckets: np.ndarray, batch: int) -> str:
    """Return the number of images of each bucket in use, in one line."""
    counts = np.bincount(buckets, minlength=len(sizes))
    used = [f"{w}x{h} {n:,}" for (h, w), n in zip(sizes, counts.tolist()) if n]
    return f"batches of {batch}, in sizes (width x height, images): {', '.join(used)}"
