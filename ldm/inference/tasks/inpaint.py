"""Inpainting: the masked pixels are generated, all others stay (LDM, arXiv 2112.10752, section 4.5)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from ldm.data.image import from_tensor
from ldm.inference.concat import padded, prompt_with_parts, sample_image
from ldm.inference.pipeline import Pipeline
from ldm.inference.randomness import Randomness
from ldm.inference.requests import InpaintRequest
from ldm.output.images import GeneratedImage


def inpaint(
    pipeline: Pipeline, image: Image.Image, mask: Image.Image, request: InpaintRequest, progress: bool = True
) -> GeneratedImage:
    """The image with its masked pixels generated; every other pixel is unchanged.

    image: RGB, any size; mask: grey, the same size, at least half white where pixels are generated. A text-conditional
    model that does not see the mask is blended with the noised image at every step: it fits the hole less well.
    """
    request = request.checked(pipeline.info)
    if image.size != mask.size:
        raise ValueError(
            f"the image is {image.width}x{image.height} pixels, its mask {mask.width}x{mask.height}: sizes must match"
        )
    generated = mask.convert("L").point(lambda level: 255 if level >= 128 else 0)
    hole = (pipeline.tensor(generated)[:, :1] > 0).float()  # (1, 1, H, W), 1 where pixels are generated
    with Randomness(request.seed, pipeline.device)(), pipeline.sampling(request):
        if pipeline.info.concat_channels:
            size, cond, uncond = _conditioning(pipeline, pipeline.tensor(image), hole, request)
            x = sample_image(pipeline, request, size, cond, uncond, progress)
        else:
            keep, x0 = _kept(pipeline, pipeline.tensor(image), hole)
            cond, uncond = pipeline.encode_prompts([request.prompt], request.negative_prompt, request.guided)
            x = sample_image(pipeline, request, x0.shape[2:], cond, uncond, progress, keep, x0)
    result = image.convert("RGB").copy()
    result.paste(from_tensor(x[0, :, : image.height, : image.width]), mask=feathered(generated, request.feather))
    info = {**request.record(), "width": image.width, "height": image.height, **pipeline.identity}
    return GeneratedImage(result, info, generated.convert("1"))


def _conditioning(
    pipeline: Pipeline, image: Tensor, hole: Tensor, request: InpaintRequest
) -> tuple[list[int], Any, Any]:
    """(latent height and width, cond, uncond).

    The published models were trained with a black hole and a mask of -1 and 1; Stable Diffusion's, which take prompts,
    with a grey hole and a mask of 0 and 1.
    """
    by_text, multiple = pipeline.info.takes_text, pipeline.info.multiple
    masked = padded(torch.where(hole > 0, 0.0 if by_text else -1.0, image), multiple)
    hole = padded(hole, multiple)
    if not by_text:
        encoded = pipeline.model.get_learned_conditioning(masked)
        size = list(encoded.shape[-2:])
        return size, torch.cat([encoded, interpolate(2.0 * hole - 1.0, size=size)], dim=1), None
    assert pipeline.info.factor is not None
    model: Any = pipeline.model  # LatentInpaintDiffusion
    size = [side // pipeline.info.factor for side in hole.shape[-2:]]
    batch = {key: masked if key == model.masked_image_key else hole for key in model.concat_keys}
    parts = model.further_parts({key: x.permute(0, 2, 3, 1) for key, x in batch.items()}, size)
    return size, *prompt_with_parts(pipeline, request, parts)


def _kept(pipeline: Pipeline, image: Tensor, hole: Tensor) -> tuple[Tensor, Tensor]:
    """(mask, x0) for the sampler, (1, 1, h, w) and (1, c, h, w): latent cells that touch the hole are generated."""
    factor, multiple, model = pipeline.info.factor, pipeline.info.multiple, pipeline.model
    assert factor is not None
    x0 = model.get_first_stage_encoding(pipeline.encode(padded(image, multiple)))
    return 1.0 - max_pool2d(padded(hole, multiple), factor), x0


def feathered(hole: Image.Image, pixels: int) -> Image.Image:
    """A mask of 0 and 255 that fades in over `pixels` from its edge: 0 stays 0, the deepest pixel is 255.

    There is no fade at the border of the image.
    """
    if pixels == 0:
        return hole
    inside = torch.from_numpy(np.asarray(hole) > 0).float()[None]  # (1, H, W)
    depth = inside.clone()  # distance to the nearest pixel outside, at most pixels + 1
    for k in range(pixels):
        # Erosion by a square and a cross in turn: an octagonal distance, close to the Euclidean one.
        rows, columns = -max_pool2d(-inside, (3, 1), 1, (1, 0)), -max_pool2d(-inside, (1, 3), 1, (0, 1))
        inside = torch.minimum(rows, columns) if k % 2 else -max_pool2d(-rows, (1, 3), 1, (0, 1))
        depth += inside
    levels = 255.0 * depth[0] / depth.max().clamp(min=1.0)
    return Image.fromarray(levels.round().byte().numpy())
