"""Images from an image and prompts (SDEdit, arXiv 2108.01073), and from its depth map with depth-to-image models."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.inference.concat import Parts
from ldm.inference.pipeline import Conditioned, Pipeline
from ldm.inference.randomness import Randomness
from ldm.inference.requests import Batch, ImageToImageRequest
from ldm.inference.tasks.text_to_image import generate_batches, in_tiles
from ldm.models.diffusion.samplers.noise import NoiseSource
from ldm.models.diffusion.samplers.registry import make_sampler
from ldm.modules.midas.api import MiDaSInference
from ldm.output.images import GeneratedImage

logger = logging.getLogger(__name__)


def image_to_image(
    pipeline: Pipeline,
    image: Image.Image,
    request: ImageToImageRequest,
    depth: np.ndarray | str | Path | None = None,
    progress: bool = True,
    only: int | None = None,
) -> Iterator[GeneratedImage]:
    """As `text_to_image`, but sampling starts from the noised latent of an image, resized to the request's size.

    Random numbers are used in the published order: the first stage's posterior, then for each batch the start's noise
    and the steps'. At strength 0 the result is the first stage's reconstruction.
    depth: for depth-to-image models: a map, float (H, W), near is large, or a folder with transformers' DPT.
    """
    request = request.checked(pipeline.info)
    if request.depth != (depth is not None):
        raise ValueError(f"the request has depth={request.depth}, but a depth map was {'not ' * (depth is None)}given")
    parts = None if depth is None else depth_parts(pipeline, request.latent_shape[1:], image, depth)
    tiled, randomness, steps = (
        in_tiles(pipeline, request),
        Randomness(request.seed, pipeline.device),
        request.encode_steps,
    )
    per_image = request.seed_mode == "image"
    with randomness(), torch.no_grad():  # outside autocast, as published
        x = pipeline.tensor(fit(image, *request.size))
        posterior = tiled.encode(x if per_image else x.expand(request.n_samples, -1, -1, -1))
        if not per_image:
            z0 = tiled.model.get_first_stage_encoding(posterior)  # (n_samples, c, h, w)
            start = torch.randn_like(z0) if request.fixed_code else None

    def sample_latents(pipeline: Pipeline, batch: Batch, noise: NoiseSource, given: Conditioned) -> Tensor:
        size = len(batch.prompts)
        z = tiled.model.get_first_stage_encoding(_samples_of(posterior, noise, size)) if per_image else z0[:size]
        if steps == 0:
            return z
        sampler = make_sampler(request.sampler, pipeline.model)
        assert request.steps is not None
        sampler.make_schedule(request.steps, request.spacing, request.eta, verbose=False)
        start_noise = noise.normal_like(z) if per_image or start is None else start[:size]
        z = sampler.stochastic_encode(z, [steps] * size, noise=start_noise)
        options: dict[str, Any] = {"callback": given.callback, "img_callback": pipeline.watch, "verbose": False}
        options |= {"noise_source": noise, **request.prediction_options}
        with pipeline.large_enough(z.shape[2:]):
            return sampler.decode(z, given.cond, steps, given.scale, given.uncond, **options)

    yield from generate_batches(pipeline, request, steps, sample_latents, randomness, None, parts, progress, only)


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image resized to what the model takes, with one log line if that changes it."""
    if image.size == (width, height):
        return image
    logger.info("resized from %dx%d to %dx%d pixels, the nearest size for this model", *image.size, width, height)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def depth_parts(pipeline: Pipeline, size: Sequence[int], image: Image.Image, depth: np.ndarray | str | Path) -> Parts:
    """Concat conditioning of a depth-to-image model for latents of `size` (h, w); depth as in `image_to_image`."""
    model: Any = pipeline.model  # LatentDepth2ImageDiffusion
    with torch.no_grad():
        if isinstance(depth, (str, Path)):
            estimated = MiDaSInference(weights=str(depth))(pipeline.tensor(image))
            return model.further_parts({model.depth_key: estimated.permute(0, 2, 3, 1)}, size)
        return model.further_parts({model.depth_key: torch.from_numpy(depth)[None]}, size)


def _samples_of(posterior: Any, noise: NoiseSource, size: int) -> Tensor:
    """Latents (size, c, h, w) of one image's posterior, each with its own noise; a deterministic latent is repeated."""
    if torch.is_tensor(posterior):
        return posterior.expand(size, -1, -1, -1)
    return posterior.mode() + posterior.std * noise.normal_like(posterior.mode().expand(size, -1, -1, -1))
