"""Pictures from pictures that the network sees beside the latent: masked ones are filled, small ones enlarged."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ldm.inference.pipeline import Pipeline
from ldm.inference.randomness import Randomness
from ldm.pictures import Picture
from ldm.task_settings import FillSettings, UpscaleSettings, check_enlarges, check_fills_masks

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

logger = logging.getLogger(__name__)


def fill(pipeline: Pipeline, image: Image.Image, mask: Image.Image, settings: FillSettings, progress: bool = True) -> Picture:
    """The picture with what is white in the mask drawn anew; every other pixel is the picture's own.

    image: RGB, any size; mask: grey, the same size, filled where it is at least half white (LDM, arXiv 2112.10752, section 4.5).
    """
    import torch
    from torch.nn.functional import interpolate

    from ldm.data.image import from_tensor

    check_fills_masks(pipeline.facts)
    settings = settings.checked(pipeline.facts)
    if image.size != mask.size:
        raise ValueError(f"the picture is {image.width}x{image.height}, its mask {mask.width}x{mask.height}: they must be alike")
    drawn = mask.convert("L").point(lambda level: 255 if level >= 128 else 0)
    hole = (pipeline.tensor(drawn)[:, :1] > 0).float()                      # (1, 1, H, W), 1 where it is filled
    masked = torch.where(hole > 0, -1.0, pipeline.tensor(image))            # black there, as in training
    with Randomness(settings.seed, pipeline.device)(), pipeline.drawing():
        encoded = pipeline.model.get_learned_conditioning(padded(masked, pipeline.facts.multiple))
        signs = interpolate(2.0 * padded(hole, pipeline.facts.multiple) - 1.0, size=encoded.shape[-2:])
        x = _draw(pipeline, torch.cat([encoded, signs], dim=1), settings, progress)
    result = image.convert("RGB").copy()
    result.paste(from_tensor(x[0, :, : image.height, : image.width]), mask=drawn)
    info = {"task": "inpaint", **asdict(settings), "width": image.width, "height": image.height, **pipeline.identity}
    return Picture(result, info, drawn.convert("1"))


def enlarge(pipeline: Pipeline, image: Image.Image, settings: UpscaleSettings, progress: bool = True) -> Picture:
    """The picture in `facts.factor` times its size: the network sees it beside a latent of the same height and width.

    image: RGB, any size (LDM, arXiv 2112.10752, section 4.4); what is larger than `settings.tile` is drawn in overlapping tiles.
    """
    from ldm.data.image import from_tensor

    check_enlarges(pipeline.facts)
    settings, factor = settings.checked(pipeline.facts), pipeline.facts.factor
    if settings.tile and max(image.size) > settings.tile:
        logger.info("%dx%d pixels are drawn in tiles of %d", image.width, image.height, settings.tile)
        pipeline = in_tiles(pipeline, settings.tile)
    with Randomness(settings.seed, pipeline.device)(), pipeline.drawing():
        small = pipeline.model.get_learned_conditioning(padded(pipeline.tensor(image), pipeline.facts.latent_multiple))
        x = _draw(pipeline, small, settings, progress, settings.sampler, settings.sampler_options)
    result = from_tensor(x[0, :, : factor * image.height, : factor * image.width])
    info = {"task": "upscale", **asdict(settings), "width": result.width, "height": result.height, **pipeline.identity}
    return Picture(result, info)


def in_tiles(pipeline: Pipeline, side: int) -> Pipeline:
    """The pipeline with a network and a first stage that see square tiles of `side` latent cells, half of which neighbors share."""
    from ldm.models.diffusion.tiling import TiledModel, Tiling

    facts = pipeline.facts
    model = TiledModel(pipeline.model, Tiling(side, side // 2), facts.factor, facts.latent_multiple)
    return Pipeline(model, facts, pipeline.device, pipeline.dtype, pipeline.identity)


def padded(x: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) with its last row and column repeated until height and width are multiples."""
    from torch.nn.functional import pad

    height, width = x.shape[-2:]
    return pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def _draw(
    pipeline: Pipeline,
    beside: Tensor,
    settings: FillSettings,
    progress: bool,
    sampler: str = "ddim",
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Tensor:
    """Pictures (1, 3, H, W) in [-1, 1] from noise, with `beside` (1, C', h, w) concatenated to every latent."""
    from tqdm import tqdm

    with tqdm(total=settings.steps, desc="drawing", unit="step", leave=False, disable=not progress) as bar:
        z, _ = pipeline.sampler(sampler).sample(
            S=settings.steps,
            batch_size=1,
            shape=(pipeline.facts.channels, *beside.shape[-2:]),
            conditioning=beside,
            eta=settings.eta,
            callback=lambda i: bar.update(),
            log_every_t=settings.steps + 1,
            verbose=False,
            **options,
        )
    return pipeline.decode(z)
