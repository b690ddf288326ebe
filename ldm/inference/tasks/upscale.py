"""Upscaling: super-resolution (LDM, arXiv 2112.10752, section 4.4), of large images in overlapping tiles."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import interpolate

from ldm.data.image import from_tensor
from ldm.inference.concat import padded, prompt_with_parts, sample_image
from ldm.inference.pipeline import Pipeline
from ldm.inference.randomness import Randomness
from ldm.inference.requests import UpscaleRequest
from ldm.inference.settings import round_to_multiple
from ldm.models.diffusion.tiling import TiledModel, Tiling
from ldm.output.images import GeneratedImage

logger = logging.getLogger(__name__)


def upscale(pipeline: Pipeline, image: Image.Image, request: UpscaleRequest, progress: bool = True) -> GeneratedImage:
    """The image at `info.factor` times its size; the network sees it concatenated with a latent of the same size.

    image: RGB, any size. Where a SpatialRescaler shrinks it to the latent's size, the result is that much smaller; if
    that is not larger than the image, the model was trained on shrunk originals, and the image is what it sees.
    Text-conditional models are also conditioned on the noise added to it, `request.noise_level`.
    """
    request, info = request.checked(pipeline.info), pipeline.info
    assert info.factor is not None
    shrink = info.image_rescaling or 1.0
    cells = shrink if info.factor * shrink > 1.0 else 1.0  # of the latent, for each pixel of the image
    if request.tile and max(image.size) > request.tile:
        logger.info("%dx%d pixels are upscaled in tiles of %d", *image.size, request.tile)
        side = max(2 * info.latent_multiple, round_to_multiple(round(request.tile * cells), info.latent_multiple))
        tiling = Tiling((side,) * 2, (side // 2,) * 2)
        pipeline = pipeline.with_model(TiledModel(pipeline.model, tiling, info.factor, info.latent_multiple))
    small = padded(pipeline.tensor(image), max(1, math.ceil(info.latent_multiple / cells)))
    with Randomness(request.seed, pipeline.device)(), pipeline.sampling(request):
        if info.takes_text:
            model: Any = pipeline.model  # LatentUpscaleDiffusion
            level = torch.full((1,), request.noise_level or 0, dtype=torch.int64, device=pipeline.device)
            noised, level = model.low_scale_model(small, level)
            cond, uncond = prompt_with_parts(pipeline, request, {"c_concat": [noised], "c_adm": level})
            size = small.shape[-2:]
        else:
            seen = interpolate(small, scale_factor=cells / shrink) if cells != shrink else small
            cond, uncond = pipeline.model.get_learned_conditioning(seen), None
            size = cond.shape[-2:]
        x = sample_image(pipeline, request, size, cond, uncond, progress)
    scale = round(info.factor * cells)
    result = from_tensor(x[0, :, : scale * image.height, : scale * image.width])
    return GeneratedImage(
        result, {**request.record(), "width": result.width, "height": result.height, **pipeline.identity}
    )
