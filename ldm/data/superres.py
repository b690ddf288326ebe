"""Pairs of an image and a degraded small one, for super-resolution."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ldm.data.base import DataConfigError, check_choice
from ldm.data.folder import ImageFolder
from ldm.data.image import RESAMPLING, crop_box, to_array
from ldm.modules.image_degradation import degradation_fn_bsr, degradation_fn_bsr_light
from ldm.modules.image_degradation.bsrgan import load_cv2

PIL_FILTERS = {
    f"pil_{name}": Image.Resampling[name.upper()]
    for name in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
}
CV_FILTERS = {
    "cv_nearest": "INTER_NEAREST",
    "cv_bilinear": "INTER_LINEAR",
    "cv_bicubic": "INTER_CUBIC",
    "cv_area": "INTER_AREA",
    "cv_lanczos": "INTER_LANCZOS4",
}
DEGRADATIONS = ("bsrgan", "bsrgan_light", *CV_FILTERS, *PIL_FILTERS)


class SuperResolution(ImageFolder):
    """Square crops as `image` and degraded copies of side size / downscale_f as `LR_image`, both in [-1, 1].

    Usable with any folder, and as a mixin of the published datasets.

    degradation: bsrgan, bsrgan_light, cv_{nearest,bilinear,bicubic,area,lanczos} (only area is antialiased) or
    pil_{nearest,bilinear,bicubic,box,hamming,lanczos} (all but nearest are antialiased).
    min_crop_f, max_crop_f: the side of the crop relative to the shorter side of the image, random for each sample.
    random_crop: at a random position, else central. The crop is scaled to `size`, by area averaging if it shrinks and
    bilinearly if it grows. Other parameters as in ImageFolder.
    """

    def __init__(
        self,
        size: int = 256,
        degradation: str = "bsrgan_light",
        downscale_f: int = 4,
        min_crop_f: float = 0.5,
        max_crop_f: float = 1.0,
        random_crop: bool = True,
        **options: Any,
    ) -> None:
        if not isinstance(size, int):
            raise DataConfigError("size", size, "not the side of a square", "set {param} to a number of pixels")
        if not isinstance(downscale_f, int) or downscale_f < 1 or size % downscale_f:
            advice = "set {param} to an integer that does"
            raise DataConfigError("downscale_f", downscale_f, f"does not divide size {size}", advice)
        if not 0 < min_crop_f <= max_crop_f <= 1:
            problem = f"expected 0 < min_crop_f <= max_crop_f <= 1, and max_crop_f is {max_crop_f}"
            raise DataConfigError("min_crop_f", min_crop_f, problem, "set {param} to a share of the shorter side")
        for param in ("crop_size", "interpolation", "masks", "buckets"):
            if param in options:
                raise DataConfigError(param, options[param], "has no effect on these pairs", "remove {param}")
        check_choice("degradation", degradation, DEGRADATIONS)
        self.degradation, self.downscale_f = degradation, downscale_f
        self.min_crop_f, self.max_crop_f = min_crop_f, max_crop_f
        super().__init__(size=size, random_crop=random_crop, **options)

    def _values(self, image: Image.Image, index: int) -> dict[str, Any]:
        large = np.asarray(self._square(image))
        small = degrade(large, self.degradation, self.downscale_f)
        return {self.image_key: to_array(Image.fromarray(large)), "LR_image": to_array(Image.fromarray(small))}

    def _square(self, image: Image.Image) -> Image.Image:
        side = max(1, round(min(image.size) * np.random.uniform(self.min_crop_f, self.max_crop_f)))
        crop = image.crop(crop_box(image.size, side, self.random_crop))
        size = self.crop_size[0]
        crop = crop.resize((size, size), RESAMPLING["box" if side >= size else "bilinear"])
        return ImageOps.mirror(crop) if self.flip_p and random.random() < self.flip_p else crop


def degrade(image: np.ndarray, name: str, factor: int) -> np.ndarray:
    """Degrade `image` uint8 (H, W, 3) by one of DEGRADATIONS -> uint8 (H // factor, W // factor, 3)."""
    if name == "bsrgan":
        return degradation_fn_bsr(image, sf=factor)["image"]
    if name == "bsrgan_light":
        return degradation_fn_bsr_light(image, sf=factor)["image"]
    size = (image.shape[1] // factor, image.shape[0] // factor)
    if name in PIL_FILTERS:
        return np.asarray(Image.fromarray(image).resize(size, PIL_FILTERS[name]))
    cv2 = load_cv2()
    return cv2.resize(image, size, interpolation=getattr(cv2, CV_FILTERS[name]))
