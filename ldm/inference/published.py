"""Functions that research code imports from the published scripts/txt2img.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ldm.inference.pipeline import load_model
from ldm.output.watermark import METHODS, Watermark


class WatermarkEncoder(Protocol):
    """The encoder of the package invisible-watermark."""

    def encode(self, cv2Image: np.ndarray, method: str) -> np.ndarray:
        """Return BGR uint8 (H, W, 3) with the watermark."""


def put_watermark(img: Image.Image, wm_encoder: WatermarkEncoder | Watermark | None = None) -> Image.Image:
    """Return the image with the encoder's watermark; without an encoder, the image."""
    if wm_encoder is None:
        return img
    if isinstance(wm_encoder, Watermark):
        return wm_encoder(img)[0]
    bgr = np.ascontiguousarray(np.asarray(img.convert("RGB"))[:, :, ::-1])
    return Image.fromarray(np.ascontiguousarray(wm_encoder.encode(bgr, METHODS[0])[:, :, ::-1]))


def load_model_from_config(config: Any, ckpt: str | Path, *_: Any, **__: Any) -> Any:
    """Return the model of a config with the weights of a file, for sampling, on the GPU if there is one."""
    return load_model(config, ckpt, precision="full").model


def chunk(it: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """Yield tuples of `size` items; the last may be shorter."""
    rest = iter(it)
    return iter(lambda: tuple(islice(rest, size)), ())


def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
    """Images (B, H, W, C) or (H, W, C) in [0, 1] -> PIL images."""
    images = images[None] if images.ndim == 3 else images
    return [Image.fromarray(np.squeeze(image)) for image in np.rint(images * 255).clip(0, 255).astype(np.uint8)]
