"""Edits of an image by instructions (InstructPix2Pix, arXiv 2211.09800)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from PIL import Image

from ldm.inference.pipeline import Pipeline
from ldm.inference.requests import EditRequest
from ldm.inference.tasks.image_to_image import fit
from ldm.inference.tasks.text_to_image import in_tiles, text_to_image
from ldm.output.images import GeneratedImage


def edit(
    pipeline: Pipeline, image: Image.Image, request: EditRequest, progress: bool = True, only: int | None = None
) -> Iterator[GeneratedImage]:
    """Generate as `text_to_image` does, under instructions and the image, which is resized to the request's size.

    The network sees the mode of the image's latent without noise; guidance by the image starts from zeros instead.
    """
    request = request.checked(pipeline.info)
    with pipeline.sampling():
        encoded = in_tiles(pipeline, request).encode(pipeline.tensor(fit(image, *request.size)))
    latent = encoded if torch.is_tensor(encoded) else encoded.mode()  # (1, c, h, w)
    parts = {"c_concat": [latent]}
    without = {"c_concat": [torch.zeros_like(latent)]} if request.image_scale != 1.0 else parts
    yield from text_to_image(pipeline, request, progress, None, only, parts, without)
