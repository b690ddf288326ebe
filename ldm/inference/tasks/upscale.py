"""Upscaling: super-resolution (LDM, arXiv 2112.10752, section 4.4), of large images in overlapping tiles."""

from __future__ import annotations

import logging
from typing import Any

import torch
from PIL import Image

from ldm.data.image import from_tensor
from ldm.inference.concat import padded, prompt_with_parts, sample_image
from ldm.inference.pipeline import Pipeline
from ldm.inference.randomness import Randomness
from ldm.inference.requests import UpscaleRequest
from ldm.models.diffusion.tiling import TiledModel, Tiling
from ldm.output.images import GeneratedImage

logger = logging.getLogger(__name__)


def upscale(pipeline: Pipeline, image: Image.Image, request: UpscaleRequest, progress: bool = True) -> GeneratedImage:
    """The image at `info.factor` times its size; the network sees it concatenated with a latent of the same size.

    image: RGB, any size. Text-conditional models are also conditioned on the noise added to it, `request.noise_level`.
    """
    request, info = request.checked(pipeline.info), pipeline.info
    assert info.factor is not None
    if request.tile and max(image.size) > request.tile:
        logger.info("%dx%d pixels are upscaled in tiles of %d", *image.size, request.tile)
        tiling = Tiling((request.tile,) * 2, (request.tile // 2,) * 2)
        pipeline = pipeline.with_model(TiledModel(pipeline.model, tiling, info.factor, info.latent_multiple))
    small = padded(pipeline.tensor(image), info.latent_multiple)
    with Randomness(request.seed, pipeline.device)(), pipeline.sampling():
        if info.takes_text:
            model: Any = pipeline.model  # LatentUpscaleDiffusion
            level = torch.full((1,), request.noise_level or 0, dtype=torch.int64, device=pipeline.device)
            noised, level = model.low_scale_model(small, level)
            cond, uncond = prompt_with_parts(pipeline, request, {"c_concat": [noised], "c_adm": level})
        else:
            cond, uncond = pipeline.model.get_learned_conditioning(small), None
        x = sample_image(pipeline, request, small.shape[-2:], cond, uncond, progress)
    result = from_tensor(x[0, :, : info.factor * image.height, : info.factor * image.width])
    return GeneratedImage(
        result, {**request.record(), "width": result.width, "height": result.height, **pipeline.identity}
    )
