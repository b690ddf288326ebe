"""Image-text shards under the names that published fine-tunes of Stable Diffusion use."""

from __future__ import annotations

import posixpath
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from PIL import Image, ImageOps

from ldm.config.instantiate import ConfigError, instantiate_from_config
from ldm.config.types import NonNegativeInt, PathText, PositiveFloat, PositiveInt, Probability
from ldm.data.base import DataConfigError, check_choice
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.image import Size, crop_box, from_array, height_and_width, to_array
from ldm.data.inpainting import CONVENTIONS, masked
from ldm.data.shards import CACHE
from ldm.data.superres import degrade
from ldm.data.webdataset import ImageShards

_TARGET = f"{__name__}.PublishedShards"


@dataclass(frozen=True)
class Split:
    """A split of WebDataModuleFromConfig.

    shards: names that follow `tar_base`, e.g. "{00000..00099}.tar", or a list. shuffle: 0 keeps the order of the
    shards; any other number shuffles all samples (published: the size of a buffer). image_key: the suffix of the image,
    and its name in the batch. image_transforms: configs of torchvision.transforms.{Resize, CenterCrop, RandomCrop,
    RandomHorizontalFlip}, applied in this order; others, and those of your own packages, need --allow-targets.
    postprocess: config of a callable that takes and returns each item, such as AddMask and AddLR.
    """

    shards: str | Sequence[str]
    shuffle: NonNegativeInt = 0
    image_key: str = "jpg"
    image_transforms: Sequence[Any] = ()
    postprocess: Mapping[str, Any] | None = None


class PublishedShards(ImageShards):
    """Images after `image_transforms` as `image_key`, with captions as `txt`; other parameters as in ImageShards."""

    def __init__(self, shards: str | Sequence[str], image_transforms: Sequence[Any] = (), **options: Any) -> None:
        self.transforms = [instantiate_from_config(transform) for transform in image_transforms]
        sizes = [transform.size for transform in self.transforms if hasattr(transform, "size")]
        super().__init__(shards, **{"size": sizes[-1] if sizes else 256, **options})

    def _values(self, image: Image.Image, index: int) -> dict[str, Any]:
        for transform in self.transforms:
            image = transform(image)
        return {self.image_key: to_array(image)}


class WebDataModuleFromConfig(DataModuleFromConfig):
    """Image-text shards with captions in `.txt`; order, random numbers and resume as in DataModuleFromConfig.

    tar_base: folder or URL of the shards; null if their names are whole. batch_size: samples per batch and rank.
    train, validation, test: see Split.
    min_size: lower limit of original_width and original_height in the JSON, else of the image. max_pwatermark,
    p_unsafe_threshold: upper limits of its `pwatermark` (1 and above: no limit) and `punsafe`. Samples without such a
    field, without image or caption, and damaged ones are left out.
    multinode: published, without effect: ranks of all machines always share the shards.
    cache, cache_gb: as in ImageShards.
    """

    def __init__(
        self,
        tar_base: PathText | None,
        batch_size: PositiveInt,
        train: Annotated[Mapping[str, Any], "ldm.data.laion.Split"] | None = None,
        validation: Annotated[Mapping[str, Any], "ldm.data.laion.Split"] | None = None,
        test: Annotated[Mapping[str, Any], "ldm.data.laion.Split"] | None = None,
        num_workers: NonNegativeInt = 4,
        multinode: bool = True,
        min_size: PositiveInt | None = None,
        max_pwatermark: float | None = 1.0,
        p_unsafe_threshold: float | None = None,
        cache: PathText = CACHE,
        cache_gb: PositiveFloat = 100.0,
    ) -> None:
        filters: dict[str, list[float | None]] = {}
        if min_size is not None and min_size > 1:
            filters |= {"original_width": [min_size, None], "original_height": [min_size, None]}
        if max_pwatermark is not None and max_pwatermark < 1:
            filters["pwatermark"] = [None, max_pwatermark]
        if p_unsafe_threshold is not None:
            filters["punsafe"] = [None, p_unsafe_threshold]
        common = {"filters": filters, "cache": cache, "cache_gb": cache_gb}
        splits = {"train": train, "validation": validation, "test": test}
        parsed = {name: _parsed(name, split) for name, split in splits.items() if split is not None}
        datasets: dict[str, Any] = {name: _dataset(tar_base, split, common) for name, split in parsed.items()}
        super().__init__(batch_size, num_workers=num_workers, **datasets)
        self._shuffle = {name: split.shuffle > 0 for name, split in parsed.items()}

    def setup(self, stage: str | None = None) -> None:
        try:
            super().setup(stage)
        except DataConfigError as error:  # the parameters of a split have no `params` of their own here
            raise ConfigError(re.sub(r"(data\.params\.\w+)\.params\.", r"\1.", str(error))) from error


def _parsed(name: str, config: Mapping[str, Any]) -> Split:
    split: Split = instantiate_from_config({"target": f"{__name__}.Split", "params": dict(config)})
    if not split.shards:
        raise DataConfigError(
            f"{name}.shards", split.shards, "names no shards", "set data.params.{param} to .tar files"
        )
    return split


def _dataset(tar_base: str | None, split: Split, common: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a split's dataset."""
    shards = [split.shards] if isinstance(split.shards, str) else list(split.shards)
    params = {
        "shards": [posixpath.join(tar_base or "", name) for name in shards],
        "image": split.image_key,
        "image_key": split.image_key,
        "image_transforms": list(split.image_transforms),
        "postprocess": split.postprocess,
        "missing_caption": "skip",
        "on_error": "skip",
        **common,
    }
    return {"target": _TARGET, "params": params}


# Shares of the image that a mask covers. The published modes are sizes of strokes and boxes in pixels; these are close.
MASK_MODES = {
    **dict.fromkeys(("256train", "512train"), (0.1, 0.5)),
    **dict.fromkeys(("256train-large", "512train-large"), (0.3, 0.7)),
}


@dataclass
class AddMask:
    """Adds `mask` (H, W, 1), 1 in the hole, else 0, and `masked_image`, which is grey (0) in the hole.

    mode: one of MASK_MODES. p_drop: probability of masking the whole image. image_key: the image, in [-1, 1].
    """

    mode: str = "512train"
    p_drop: Probability = 0.0
    image_key: str = "jpg"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MASK_MODES)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = sample[self.image_key]
        return {**sample, **masked(image, *MASK_MODES[self.mode], self.p_drop, CONVENTIONS["stable-diffusion"])}


@dataclass
class AddLR:
    """Adds `lr` (output_size, output_size, 3) in [-1, 1]: the image after the light degradation by `factor`.

    initial_size: the image is scaled to this side before. image_key: the image, in [-1, 1].
    """

    factor: PositiveInt
    output_size: PositiveInt
    initial_size: PositiveInt | None = None
    image_key: str = "jpg"

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = from_array(sample[self.image_key])
        if self.initial_size is not None:
            image = image.resize((self.initial_size,) * 2, Image.Resampling.BICUBIC)
        small = Image.fromarray(degrade(np.asarray(image), "bsrgan_light", self.factor))
        return {**sample, "lr": to_array(small.resize((self.output_size,) * 2, Image.Resampling.BICUBIC))}


@dataclass
class Resize:
    """Scale the shorter side to `size`, or to (height, width). interpolation: of Image.Resampling."""

    size: Size
    interpolation: Annotated[int, "[0, 5]"] = 2

    def __call__(self, image: Image.Image) -> Image.Image:
        if isinstance(self.size, int):
            scale = self.size / min(image.size)
            target = max(self.size, round(image.width * scale)), max(self.size, round(image.height * scale))
        else:
            target = self.size[1], self.size[0]
        return image.resize(target, Image.Resampling(self.interpolation))


@dataclass
class CenterCrop:
    """Cut `size` (a side, or (height, width)) from the center."""

    size: Size

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.crop(crop_box(image.size, height_and_width(self.size), at_random=False))


@dataclass
class RandomCrop:
    """Cut `size` (a side, or (height, width)) at a random position."""

    size: Size

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.crop(crop_box(image.size, height_and_width(self.size), at_random=True))


@dataclass
class RandomHorizontalFlip:
    """Flip with probability p."""

    p: Probability = 0.5

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.mirror(image) if random.random() < self.p else image
