"""Pairs of a picture and a degraded small one, for super-resolution."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from PIL import Image

from ldm.data import image as pictures
from ldm.data.base import DataConfigError
from ldm.data.folder import ImageFolder
from ldm.modules.image_degradation import degradation_fn_bsr, degradation_fn_bsr_light
from ldm.modules.image_degradation.opencv import load_cv2

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
    """Squares of pictures with what a degradation makes of them: `image` float32 (size, size, 3) and `LR_image` float32
    (size / downscale_f, size / downscale_f, 3), both in [-1, 1]. For a folder of any kind, and a mixin of the families.

    degradation: bsrgan, bsrgan_light, cv_{nearest,bilinear,bicubic,area,lanczos} (not antialiased, but for area) or
    pil_{nearest,bilinear,bicubic,box,hamming,lanczos} (antialiased, but for nearest).
    min_crop_f, max_crop_f: the square's side as a share of the picture's shorter one, drawn for each sample; random_crop: from any place,
    else from the middle. It is brought to `size` by area averaging where it shrinks and bilinearly where it grows.
    Other parameters are those of ImageFolder.
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
            raise DataConfigError("size", size, "no side of a square", "set {param} to a number of pixels")
        if not isinstance(downscale_f, int) or downscale_f < 1 or size % downscale_f:
            raise DataConfigError(
                "downscale_f", downscale_f, f"does not divide size {size}", "set {param} to an integer that does"
            )
        if not 0 < min_crop_f <= max_crop_f <= 1:
            raise DataConfigError(
                "min_crop_f", min_crop_f, f"with max_crop_f {max_crop_f} no range in (0, 1]", "set {param} to a share"
            )
        for param in ("crop_size", "interpolation"):
            if param in options:
                raise DataConfigError(param, options[param], "has no effect on these pairs", "take {param} out")
        if degradation not in DEGRADATIONS:
            raise DataConfigError(
                "degradation", degradation, "unknown", f"set {{param}} to one of {', '.join(DEGRADATIONS)}"
            )
        self.degradation, self.downscale_f = degradation, downscale_f
        self.min_crop_f, self.max_crop_f = min_crop_f, max_crop_f
        super().__init__(size=size, random_crop=random_crop, **options)

    def _values(self, picture: Image.Image, index: int) -> dict[str, Any]:
        large = np.asarray(self._square(picture))
        small = degrade(large, self.degradation, self.downscale_f)
        return {
            self.image_key: pictures.to_array(Image.fromarray(large)),
            "LR_image": pictures.to_array(Image.fromarray(small)),
        }

    def _square(self, picture: Image.Image) -> Image.Image:
        side = max(1, round(min(picture.size) * np.random.uniform(self.min_crop_f, self.max_crop_f)))
        cut = (pictures.random_crop if self.random_crop else pictures.center_crop)(picture, side)
        cut = pictures.resize_to_cover(cut, self.size, "box" if side >= self.size[0] else "bilinear")
        return pictures.flip(cut) if self.flip_p and random.random() < self.flip_p else cut


def degrade(image: np.ndarray, how: str, factor: int) -> np.ndarray:
    """`image` uint8 (H, W, 3) -> uint8 (H // factor, W // factor, 3) by one of DEGRADATIONS."""
    if how == "bsrgan":
        return degradation_fn_bsr(image, sf=factor)["image"]
    if how == "bsrgan_light":
        return degradation_fn_bsr_light(image, sf=factor)["image"]
    size = (image.shape[1] // factor, image.shape[0] // factor)
    if how in PIL_FILTERS:
        return np.asarray(Image.fromarray(image).resize(size, PIL_FILTERS[how]))
    cv2 = load_cv2()
    return cv2.resize(image, size, interpolation=getattr(cv2, CV_FILTERS[how]))
