"""Pictures from pictures that the network sees beside the latent: masked ones are filled, small ones enlarged, depths drawn anew."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ldm.config.model_info import takes_text
from ldm.inference.pipeline import Pipeline
from ldm.inference.randomness import Randomness
from ldm.inference.task_settings import (
    ConcatRequest,
    InpaintRequest,
    UpscaleRequest,
    require_inpainting_model,
    require_upscaler,
)
from ldm.output.images import GeneratedImage

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from PIL import Image
    from torch import Tensor

logger = logging.getLogger(__name__)


def inpaint(
    pipeline: Pipeline, image: Image.Image, mask: Image.Image, settings: InpaintRequest, progress: bool = True
) -> GeneratedImage:
    """The picture with what is white in the mask drawn anew; every other pixel is the picture's own.

    image: RGB, any size; mask: grey, the same size, filled where it is at least half white (LDM, arXiv 2112.10752, section 4.5). Models
    that are led by a prompt see a grey hole and a mask of 0 and 1 as Stable Diffusion's do, the others a black one and -1 and 1.
    """
    import torch
    from torch.nn.functional import interpolate

    from ldm.data.image import from_tensor

    require_inpainting_model(pipeline.info)
    settings, multiple = settings.checked(pipeline.info), pipeline.info.multiple
    if image.size != mask.size:
        raise ValueError(
            f"the picture is {image.width}x{image.height}, its mask {mask.width}x{mask.height}: they must be alike"
        )
    drawn = mask.convert("L").point(lambda level: 255 if level >= 128 else 0)
    hole = (pipeline.tensor(drawn)[:, :1] > 0).float()  # (1, 1, H, W), 1 where it is filled
    led = takes_text(pipeline.info)
    masked = torch.where(hole > 0, 0.0 if led else -1.0, pipeline.tensor(image))  # grey or black there, as in training
    masked, hole = padded(masked, multiple), padded(hole, multiple)
    with Randomness(settings.seed, pipeline.device)(), pipeline.drawing():
        if led:
            model, size = pipeline.model, [side // pipeline.info.factor for side in hole.shape[-2:]]
            batch = {key: masked if key == model.masked_image_key else hole for key in model.concat_keys}
            parts = model.further_parts({key: x.permute(0, 2, 3, 1) for key, x in batch.items()}, size)
            cond, uncond = prompted(pipeline, parts, settings)
        else:
            encoded = pipeline.model.get_learned_conditioning(masked)
            size = encoded.shape[-2:]
            cond, uncond = torch.cat([encoded, interpolate(2.0 * hole - 1.0, size=size)], dim=1), None
        x = _draw(pipeline, size, cond, uncond, settings, progress)
    result, soft = image.convert("RGB").copy(), feathered(drawn, settings.feather)
    result.paste(from_tensor(x[0, :, : image.height, : image.width]), mask=soft)
    info = {"task": "inpaint", **asdict(settings), "width": image.width, "height": image.height, **pipeline.identity}
    return GeneratedImage(result, info, drawn.convert("1"))


def feathered(hole: Image.Image, pixels: int) -> Image.Image:
    """A mask of 0 and 255 whose white fades in over so many pixels from its edge; what is 0 stays 0, and its deepest pixel 255.

    The picture's own edge is none: a hole that reaches it does not fade there.
    """
    if pixels == 0:
        return hole
    import numpy as np
    import torch
    from PIL import Image
    from torch.nn.functional import max_pool2d

    inside = torch.from_numpy(np.asarray(hole) > 0).float()[None]  # (1, H, W)
    depth = inside.clone()  # steps from the nearest kept pixel, at most pixels + 1
    for k in range(pixels):
        # A square and a cross in turn: the distance grows as in an octagon, nearly as in a circle.
        rows, columns = -max_pool2d(-inside, (3, 1), 1, (1, 0)), -max_pool2d(-inside, (1, 3), 1, (0, 1))
        inside = torch.minimum(rows, columns) if k % 2 else -max_pool2d(-rows, (1, 3), 1, (0, 1))
        depth += inside
    levels = 255.0 * depth[0] / depth.max().clamp(min=1.0)
    return Image.fromarray(levels.round().byte().numpy())


def upscale(pipeline: Pipeline, image: Image.Image, settings: UpscaleRequest, progress: bool = True) -> GeneratedImage:
    """The picture in `info.factor` times its size: the network sees it beside a latent of the same height and width.

    image: RGB, any size (LDM, arXiv 2112.10752, section 4.4); what is larger than `settings.tile` is drawn in overlapping tiles. Models
    that are led by a prompt are told how much noise was added to the picture first, `settings.noise_level`.
    """
    import torch

    from ldm.data.image import from_tensor

    require_upscaler(pipeline.info)
    settings, factor = settings.checked(pipeline.info), pipeline.info.factor
    if settings.tile and max(image.size) > settings.tile:
        logger.info("%dx%d pixels are drawn in tiles of %d", image.width, image.height, settings.tile)
        pipeline = in_tiles(pipeline, settings.tile)
    small = padded(pipeline.tensor(image), pipeline.info.latent_multiple)
    with Randomness(settings.seed, pipeline.device)(), pipeline.drawing():
        if takes_text(pipeline.info):
            level = torch.full((1,), settings.noise_level, dtype=torch.int64, device=pipeline.device)
            noised, level = pipeline.model.low_scale_model(small, level)
            cond, uncond = prompted(pipeline, {"c_concat": [noised], "c_adm": level}, settings)
        else:
            cond, uncond = pipeline.model.get_learned_conditioning(small), None
        x = _draw(pipeline, small.shape[-2:], cond, uncond, settings, progress)
    result = from_tensor(x[0, :, : factor * image.height, : factor * image.width])
    info = {"task": "upscale", **asdict(settings), "width": result.width, "height": result.height, **pipeline.identity}
    return GeneratedImage(result, info)


def depth_parts(
    pipeline: Pipeline, size: Sequence[int], image: Image.Image, depth: np.ndarray | str | Path
) -> dict[str, Any]:
    """What a depth-to-image model sees beside latents of `size` (h, w).

    depth: a map, float (H, W), near is large; or a local folder with transformers' DPT, which estimates that of `image`.
    """
    from pathlib import Path

    import torch

    model = pipeline.model
    with torch.no_grad():
        if isinstance(depth, (str, Path)):
            from ldm.modules.midas.api import MiDaSInference

            estimated = MiDaSInference(weights=str(depth))(pipeline.tensor(image))
            return model.further_parts({model.depth_key: estimated.permute(0, 2, 3, 1)}, size)
        return model.further_parts({model.depth_key: torch.from_numpy(depth)[None]}, size)


def with_parts(cond: Any, parts: Mapping[str, Any]) -> dict[str, Any]:
    """A batch's encoded prompts (B, L, D) with further parts of one sample, which serve all of them."""
    from ldm.models.diffusion.conditioning import map_tensors

    return {"c_crossattn": [cond], **map_tensors(lambda x: x.expand(len(cond), *x.shape[1:]), dict(parts))}


def prompted(pipeline: Pipeline, parts: Mapping[str, Any], settings: ConcatRequest) -> tuple[Any, Any]:
    """(condition, what guidance leads away from; None without guidance) of the one prompt and further parts."""
    cond, uncond = pipeline.encode_prompts([settings.prompt], settings.negative_prompt, settings.scale)
    return with_parts(cond, parts), None if uncond is None else with_parts(uncond, parts)


def in_tiles(pipeline: Pipeline, side: int) -> Pipeline:
    """The pipeline with a network and a first stage that see square tiles of `side` latent cells, half of which neighbors share."""
    from ldm.models.diffusion.tiling import TiledModel, Tiling

    info = pipeline.info
    model = TiledModel(pipeline.model, Tiling(side, side // 2), info.factor, info.latent_multiple)
    return Pipeline(model, info, pipeline.device, pipeline.dtype, pipeline.identity)


def padded(x: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) with its last row and column repeated until height and width are multiples."""
    from torch.nn.functional import pad

    height, width = x.shape[-2:]
    return pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def _draw(
    pipeline: Pipeline, size: Sequence[int], cond: Any, uncond: Any, settings: ConcatRequest, progress: bool
) -> Tensor:
    """Pictures (1, 3, H, W) in [-1, 1] from noise of `size` (h, w), under a condition that holds what is beside the latent."""
    from tqdm import tqdm

    with tqdm(total=settings.steps, desc="drawing", unit="step", leave=False, disable=not progress) as bar:
        z, _ = pipeline.sampler(settings.sampler).sample(
            S=settings.steps,
            batch_size=1,
            shape=(pipeline.info.channels, *size),
            conditioning=cond,
            eta=settings.eta,
            unconditional_guidance_scale=settings.scale,
            unconditional_conditioning=uncond,
            callback=lambda i: bar.update(),
            log_every_t=settings.steps + 1,
            verbose=False,
            **settings.sampler_options,
        )
    return pipeline.decode(z)
