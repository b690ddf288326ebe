"""Concat conditioning: what inpainting, upscaling and depth-to-image have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ldm.inference.pipeline import Conditioned, Pipeline, progress_bar
from ldm.inference.requests import ConcatRequest
from ldm.models.diffusion.conditioning import map_tensors

Parts = Mapping[str, Any]
"""Parts of a condition besides the text, e.g. {"c_concat": [x], "c_adm": y}, for one image."""


def with_parts(cond: Any, parts: Parts | None) -> Any:
    """A condition with encoded prompts (B, L, D) and further parts of one image, repeated for the batch."""
    if cond is None or parts is None:
        return cond
    return {"c_crossattn": [cond], **map_tensors(lambda x: x.expand(len(cond), *x.shape[1:]), dict(parts))}


def prompt_with_parts(pipeline: Pipeline, request: ConcatRequest, parts: Parts) -> tuple[Any, Any]:
    """(cond, uncond) of the request's one prompt and further parts; uncond is None without guidance."""
    cond, uncond = pipeline.encode_prompts([request.prompt], request.negative_prompt, request.guided)
    return with_parts(cond, parts), with_parts(uncond, parts)


def sample_image(
    pipeline: Pipeline,
    request: ConcatRequest,
    size: Sequence[int],
    cond: Any,
    uncond: Any,
    progress: bool,
    mask: Tensor | None = None,
    x0: Tensor | None = None,
) -> Tensor:
    """Image (1, 3, H, W) in [-1, 1] from noise of `size` (h, w); the condition holds the concatenated parts.

    Where mask (1, 1, h, w) is 1, the latent keeps x0 (1, c, h, w).
    """
    assert request.steps is not None and request.scale is not None
    with progress_bar(request.steps, progress, leave=False) as bar:
        given = Conditioned(cond, uncond, request.scale, lambda i: bar.update(), mask, x0)
        return pipeline.decode(pipeline.sample(request, (1, pipeline.info.channels, *size), given))


def padded(x: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) with its last row and column repeated until height and width are multiples."""
    height, width = x.shape[-2:]
    return pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")
