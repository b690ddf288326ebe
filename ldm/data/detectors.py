"""Detectors that make the hint of a ControlNet from an image: Canny edges and depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from PIL import Image

from ldm.config.model_info import CANNY
from ldm.data.image import to_array
from ldm.modules.image_degradation.bsrgan import load_cv2

if TYPE_CHECKING:
    from ldm.modules.midas.api import MiDaSInference

Detector = Callable[[Image.Image], Image.Image]
"""An RGB image -> its hint, an RGB image of the same size."""


def make_detector(name: str, canny: Sequence[int] = CANNY, depth_weights: str | Path | None = None) -> Detector:
    """Return one of DETECTORS; `none` leaves the image as it is.

    canny: lower and upper threshold of the gradient. depth_weights: folder with transformers' DPT, which is loaded when
    the detector is first called.
    """
    if name == "canny":
        low, high = canny
        return partial(canny_edges, low=low, high=high)  # a dataset with a lambda cannot be sent to workers
    if name == "depth":
        return partial(depth_map, weights=str(depth_weights))
    return Image.Image.copy


def is_depth_model(folder: str | Path | None) -> bool:
    """Return whether a folder may hold transformers' DPT."""
    return folder is not None and (Path(folder) / "config.json").is_file()


def canny_edges(image: Image.Image, low: int = CANNY[0], high: int = CANNY[1]) -> Image.Image:
    """White edges on black (Canny 1986, https://doi.org/10.1109/TPAMI.1986.4767851)."""
    edges: np.ndarray = load_cv2().Canny(np.asarray(image.convert("RGB")), low, high)  # (H, W), 0 or 255
    return Image.fromarray(edges).convert("RGB")


def depth_map(image: Image.Image, weights: str | Path) -> Image.Image:
    """Inverse depth in grey, the nearest point white, by transformers' DPT in a folder."""
    import torch  # for this detector alone

    x = torch.from_numpy(to_array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W)
    depth = _estimator(str(weights))(x)[0, 0]  # (H, W)
    depth = (depth - depth.min()) / (depth.max() - depth.min()).clamp_min(1e-6)
    return Image.fromarray((255 * depth).round().byte().numpy()).convert("RGB")


@cache
def _estimator(weights: str) -> MiDaSInference:
    from ldm.modules.midas.api import MiDaSInference  # torch and transformers

    return MiDaSInference(weights=weights)


def level_ranges(image: Image.Image) -> tuple[tuple[int, int], ...]:
    """The smallest and the largest value, 0 to 255, of each channel of an RGB image."""
    return cast("tuple[tuple[int, int], ...]", image.getextrema())


def to_hint(image: Image.Image) -> np.ndarray:
    """A hint image as float32 (H, W, 3) in [0, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255
