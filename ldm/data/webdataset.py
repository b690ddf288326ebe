"""Images and captions from tar shards, in the layout that img2dataset and the webdataset library write."""

from __future__ import annotations

import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.cli import counted
from ldm.config.instantiate import instantiate_from_config
from ldm.config.suggest import did_you_mean
from ldm.config.types import PathText, PositiveFloat, PositiveInt
from ldm.data.base import DataConfigError, check_choice
from ldm.data.image import EXTENSIONS, BadImageError, Size, load_image
from ldm.data.image_dataset import ImageDataset, digest
from ldm.data.order import lane_order
from ldm.data.shards import (
    CACHE,
    TEXTS,
    Index,
    ShardError,
    Store,
    build_indices,
    content_hash,
    expand,
    read_captions,
)

logger = logging.getLogger(__name__)

_JSON = "json."  # begins `captions` that are in a field of the JSON
_MEASURED = ("width", "height", "side", "ratio")  # fields of every image; `side` is the shorter one
_ORIGINAL = {"original_width": "width", "original_height": "height"}  # in the JSON, else the measured ones


class _Digests(NamedTuple):
    """Hashes of the samples of a shard that are used."""

    keys: str
    images: str
    captions: str


class _Selected(NamedTuple):
    """The samples of a shard that are used, n of them."""

    rows: np.ndarray  # int32 (n,), in the index of the shard
    sizes: np.ndarray  # int32 (n, 2), width and height
    digests: _Digests


class _Open(NamedTuple):
    """An open shard."""

    file: BinaryIO
    keys: list[str]
    images: np.ndarray  # int64 (N, 3), offset, size and hash
    captions: np.ndarray


class ImageShards(ImageDataset):
    """Images of tar shards; sizes, crops, captions and errors as in ImageDataset. An item also holds `__key__`.

    shards: .tar files as paths, URLs (https://, s3://, gs://), patterns such as `data/{00000..00039}.tar` and
    `data/*.tar`, folders, or a list of them. Each gets an index of its samples the first time (ldm.data.shards).
    captions: the suffix of the text next to each image, txt, text or caption, perhaps after others (`long.txt`);
    `json.FIELD` for a field of its JSON, a text or a list of texts, of which each sample takes a random one; null for
    none. image: the suffix of the image, if samples hold several.

    filters: {field: [least, most]} of images to use; null for no limit. Fields are the numeric ones of the JSON, such
    as AESTHETIC_SCORE, and width, height, side (the shorter one) and ratio (width / height) of the image itself.
    original_width and original_height, if the JSON lacks them, are those of the image.
    missing_fields: skip images without such a field, keep them, or raise. on_error: skip also leaves out damaged shards
    and records. The log counts what is left out, by reason.

    lanes: shards that are read at a time, see `lane_order`; with a multiple of the number of ranks, each rank reads
    shards of its own. cache: folder for copies of remote shards, cache_gb: their size in GB, and for indices that
    cannot be next to their shards. postprocess: config of a callable that takes and returns each item.
    """

    def __init__(
        self,
        shards: PathText | Sequence[str],
        size: Size | None = 256,
        captions: str | None = "txt",
        image: str | None = None,
        filters: Mapping[str, Any] | None = None,
        missing_fields: str = "skip",
        lanes: PositiveInt = 64,
        cache: PathText = CACHE,
        cache_gb: PositiveFloat = 100.0,
        postprocess: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.captioned = captions is not None
        super().__init__(size, **options)
        check_choice("missing_fields", missing_fields, ("skip", "keep", "raise"))
        self.filters = {name: _limits(name, limits) for name, limits in (filters or {}).items()}
        self.missing_fields, self.lanes = missing_fields, lanes
        self._caption_suffix, self._field = _caption_place(captions)
        given = None if image is None else image.lower().removeprefix(".")
        self._image_suffixes = sorted(each[1:] for each in EXTENSIONS) if given is None else [given]
        self._image_name = "image" if given is None else f".{given}"
        self.postprocess = None if postprocess is None else instantiate_from_config(postprocess)
        self.store = Store(cache, cache_gb * 1e9)
        self.shards = expand(shards)
        self.left_out: Counter[str] = Counter()  # samples by reason
        self._suffixes: set[str] = set()  # of the files in all shards
        build_indices(self.shards, self.store)
        selected = self._select_all()
        self._rows = [each.rows for each in selected]
        self._starts = np.cumsum([0, *(len(rows) for rows in self._rows)])
        self.sizes = np.concatenate([each.sizes for each in selected])  # int32 (N, 2), width and height
        self._digests = [each.digests for each in selected]
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._process = os.getpid()
        counts = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.most_common())
        total = len(self) + self.left_out.total()
        kept = f"{len(self):,} of {counted(total, 'image')}" + (f", left out: {counts}" if counts else "")
        if not len(self):
            advice = "set {param} to shards with images, or filters and captions to what they hold"
            problem = f"none of {total:,} images can be used ({counts})"
            if suffixes := ", ".join(f".{suffix}" for suffix in sorted(self._suffixes)[:10]):
                problem += f"; their files end in {suffixes}"
            raise DataConfigError("shards", shards, problem, advice)
        logger.info("%s: %s", counted(len(self.shards), "shard"), kept)
        if self.skipped:
            first = "; ".join(f"{what}: {reason}" for what, reason in list(self.skipped.items())[:3])
            logger.warning("skipped %d damaged shards or records (first: %s)", len(self.skipped), first)

    @classmethod
    def prepare_data(cls, shards: str | Sequence[str], cache: str = CACHE, cache_gb: float = 100.0, **_: Any) -> None:
        """Build the missing indices, once on each machine."""
        build_indices(expand(shards), Store(cache, cache_gb * 1e9))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sample_order(self, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
        """Return the indices of an epoch -> (N,) int64, see `lane_order`."""
        return lane_order(self.shard_lengths, self.lanes, seed, epoch) if shuffle else np.arange(len(self))

    @property
    def shard_lengths(self) -> list[int]:
        """The number of samples of each shard that are used."""
        return [len(rows) for rows in self._rows]

    @cached_property
    def fingerprint(self) -> dict[str, int | str]:
        """Hashes of the shards' names and the keys of their samples, of captions and images; the lanes of the order."""
        names = [Path(shard).name for shard in self.shards]
        labels = [self._caption_suffix, self._field, self.prompts.templates, self.prompts.subject]
        return {
            "files": digest([names, [each.keys for each in self._digests]]),
            "labels": digest([*labels, [each.captions for each in self._digests]]),
            "content": digest([each.images for each in self._digests]),
            "lanes": min(self.lanes, len(self.shards)),
            **self.bucket_fingerprint,
        }

    def file_of(self, index: int) -> str:
        """Return the shard of a sample and its key: data/00003.tar/000030017."""
        return f"{self.shards[self.shard_of(index)]}/{self.key(index)}"

    def key(self, index: int) -> str:
        """Return the key of a sample, the name of its files without their suffixes."""
        shard, row = self._place(index)
        return self._opened(shard).keys[row]

    def shard_of(self, index: int) -> int:
        """Return the number of a sample's shard in `shards`."""
        return int(np.searchsorted(self._starts, index, "right")) - 1

    def _sample(self, index: int) -> dict[str, Any]:
        sample = {**super()._sample(index), "__key__": self.key(index)}
        return sample if self.postprocess is None else self.postprocess(sample)

    def _load(self, index: int) -> Image.Image:
        shard, row = self._place(index)
        content = self._read(shard, self._opened(shard).images[row])
        image = load_image(self.file_of(index), self.max_pixels, content=content)
        self._check_size(self.file_of(index), *image.size)
        return image

    def _captions(self, index: int) -> Sequence[str]:
        shard, row = self._place(index)
        place = self._opened(shard).captions[row]
        found = read_captions(self._read(shard, place), self._field) if place[1] >= 0 else []
        return self.caption_policy.apply(self.file_of(index), found, "no text")[0]

    def _place(self, index: int) -> tuple[int, int]:
        """Return the number of a sample's shard, and its row there."""
        shard = self.shard_of(index)
        return shard, int(self._rows[shard][index - self._starts[shard]])

    def _read(self, shard: int, place: np.ndarray) -> bytes:
        offset, size, expected = map(int, place)
        file = self._opened(shard).file
        file.seek(offset)
        content = file.read(size)
        if content_hash(content) != expected:
            raise self._changed(shard)
        return content

    def _changed(self, shard: int) -> BadImageError:
        name = self.shards[shard]
        reason = f"was changed after it was indexed: delete {self.store.stale(name)} and start again"
        return BadImageError(name, reason)

    def _opened(self, shard: int) -> _Open:
        if self._process != os.getpid():  # a forked data worker shares the positions in the files of its parent
            self._open, self._process = OrderedDict(), os.getpid()
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= self.lanes:
            self._open.popitem(last=False)[1].file.close()
        name = self.shards[shard]
        try:
            index = self.store.index(name)
            file = self.store.path(name).open("rb")
        except (OSError, ShardError) as error:
            raise BadImageError(name, str(error).removeprefix(f"{name}: ")) from error
        rows = self._rows[shard]
        if index.size != os.fstat(file.fileno()).st_size or self._digests_of(index, rows) != self._digests[shard]:
            file.close()
            raise self._changed(shard)
        images, captions = (index.member(each)[:, [0, 1, 4]] for each in (self._image_suffixes, [self._caption_suffix]))
        self._open[shard] = _Open(file, index.keys, images, captions)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # open files cannot be pickled

    # ------------------------------------------------------------------------------------------------- which samples

    def _select_all(self) -> list[_Selected]:
        selected, known, texts = [], {*_MEASURED, *_ORIGINAL}, set[str]()
        for shard in tqdm(self.shards, "selecting images", leave=False, delay=3, disable=None):
            try:
                index = self.store.index(shard)
            except ShardError as error:
                self._unusable(shard, str(error).removeprefix(f"{shard}: "))
                index = Index([], {}, {}, {}, {}, "", 0)
            known |= index.numbers.keys()
            texts |= index.texts.keys()
            self._suffixes |= index.members.keys()
            selected.append(self._select(shard, index))
        for name in self.filters:
            if name not in known:
                problem = (
                    "this field holds text" if name in texts else f"no image has this field{did_you_mean(name, known)}"
                )
                raise DataConfigError("filters", name, problem, "set {param} to fields with numbers")
        return selected

    def _select(self, shard: str, index: Index) -> _Selected:
        """Return the samples of a shard that can be used; count the others by reason."""
        images = index.member(self._image_suffixes)
        width, height = images[:, 2], images[:, 3]
        kept = np.ones(len(index.keys), bool)

        def leave_out(which: np.ndarray, reason: str) -> None:
            if (kept & which).any():
                self.left_out[reason] += int((kept & which).sum())
                kept[which] = False

        if index.damage:
            self._unusable(shard, index.damage)
        for row, reason in index.problems.items():
            self._unusable(f"{shard}/{index.keys[row]}", reason)
        for reason in dict.fromkeys(index.problems.values()):
            these = [row for row, each in index.problems.items() if each == reason]
            leave_out(np.isin(np.arange(len(kept)), these), f"damaged ({reason})")
        without = images[:, 1] < 0
        if self.on_error == "raise" and without.any():
            row = int(without.argmax())
            found = ", ".join(f".{suffix}" for suffix, each in index.members.items() if each[row, 1] >= 0)
            self._unusable(f"{shard}/{index.keys[row]}", f"has no {self._image_name} (it has {found})")
        leave_out(without, "without an image" if self._image_name == "image" else f"without {self._image_name}")
        leave_out(width * height > self.max_pixels, f"above {self.max_pixels:,} pixels")
        side = np.minimum(width, height)
        leave_out(side < self.min_size, f"with a side below min_size {self.min_size}")
        ratio = width / np.maximum(height, 1)
        measured = {"width": width, "height": height, "side": side, "ratio": ratio}
        for name, (least, most) in self.filters.items():
            values = measured.get(name, index.numbers.get(name, np.full(len(kept), np.nan)))
            if name in _ORIGINAL:  # written only for images that img2dataset or make_shards.py scaled
                values = np.where(np.isnan(values), measured[_ORIGINAL[name]], values)
            missing = np.isnan(values)
            if self.missing_fields == "raise" and (kept & missing).any():
                problem = f"{shard}/{index.keys[int((kept & missing).argmax())]} has no field {name!r}"
                raise DataConfigError("missing_fields", "raise", problem, "set {param} to skip or keep")
            if self.missing_fields == "skip":
                leave_out(missing, f"without {name}")
            leave_out(values < least, f"with {name} below {least:g}")
            leave_out(values > most, f"with {name} above {most:g}")
        captions = index.member([self._caption_suffix])
        if self.captioned:
            for which, reason in self._without_caption(shard, index, captions, kept):
                leave_out(which, reason)
        rows = np.flatnonzero(kept).astype(np.int32)
        return _Selected(rows, images[rows, 2:4].astype(np.int32), self._digests_of(index, rows))

    def _digests_of(self, index: Index, rows: np.ndarray) -> _Digests:
        """Return the hashes of the samples in these rows of a shard, as far as its index has them."""
        rows = rows[rows < len(index.keys)]
        keys = "\n".join(index.keys[row] for row in rows).encode(errors="surrogatepass")  # names may not be UTF-8
        members = (index.member(each)[rows, 4].tobytes() for each in (self._image_suffixes, [self._caption_suffix]))
        return _Digests(*map(digest, (keys, *members)))

    def _without_caption(
        self, shard: str, index: Index, captions: np.ndarray, kept: np.ndarray
    ) -> Iterator[tuple[np.ndarray, str]]:
        """Yield the samples, bool (N,), that the policies for missing and long captions leave out, and the reason."""
        if self._field is None:
            chars, where = captions[:, 2], f"its .{self._caption_suffix}"
        else:
            chars = index.texts.get(self._field, np.zeros(len(kept), np.int32))
            where = f"the field {self._field!r} of its .json"
        policy = self.caption_policy
        missing, long = chars <= 0, chars > policy.max_chars
        if policy.missing != "empty":
            for row in np.flatnonzero(kept & missing)[:1]:
                policy.apply(f"{shard}/{index.keys[row]}", [], f"no text in {where}")  # raises if the policy is raise
            yield missing, "without a caption"
        if policy.long != "truncate":
            for row in np.flatnonzero(kept & long)[:1]:
                policy.apply(f"{shard}/{index.keys[row]}", ["x" * int(chars[row])], "")
            yield long, f"with a caption over {policy.max_chars:,} characters"


def _caption_place(captions: str | None) -> tuple[str, str | None]:
    """Return the suffix of the member with the captions, and the field of its JSON or None. Raises DataConfigError."""
    if captions is None:
        return "", None
    if captions.lower().startswith(_JSON):
        return "json", captions[len(_JSON) :]
    suffix = captions.lower().removeprefix(".")
    if suffix.rpartition(".")[2] not in TEXTS:
        advice = f"set {{param}} to {', '.join(sorted(TEXTS))}, json.FIELD or null"
        raise DataConfigError("captions", captions, "is no suffix of texts", advice)
    return suffix, None


def _limits(name: str, limits: Any) -> tuple[float, float]:
    """Return (least, most) of a filter."""
    pair = list(limits) if isinstance(limits, Sequence) and not isinstance(limits, str) else []
    numbers = all(each is None or (isinstance(each, int | float) and not isinstance(each, bool)) for each in pair)
    if len(pair) != 2 or not numbers:
        advice = f"set {{param}}.{name} to [least, most], with null for no limit"
        raise DataConfigError("filters", {name: limits}, "not two limits", advice)
    least = -np.inf if pair[0] is None else pair[0]
    most = np.inf if pair[1] is None else pair[1]
    if not least <= most:  # also of NaN
        raise DataConfigError("filters", {name: limits}, "leaves nothing", f"set {{param}}.{name} to [least, most]")
    return float(least), float(most)
