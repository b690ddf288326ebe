"""Classifier-free guidance, its rescaling, and the thresholding of predictions that large guidance scales need."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ldm.models.diffusion.conditioning import Conditioning, join_conditions


def guided_output(
    apply_model: Callable[[Tensor, Tensor, Conditioning], Tensor],
    x: Tensor,
    t: Tensor,
    cond: Conditioning,
    uncond: Conditioning,
    scale: float,
    rescale: float = 0.0,
    image_scale: float = 1.0,
) -> Tensor:
    """Network output under classifier-free guidance, u + scale * (c - u) (Ho & Salimans 2022, eq. 6, w = scale - 1).

    x: (B, C, H, W), t: (B,) int64, or float for continuous-time samplers -> (B, C, H, W), in the model's own
    parameterization. Without `uncond`, or at scales of 1, this is the plain call. `rescale`: see `rescale_guidance`.
    image_scale: guidance by the image in `c_concat`, which `uncond` lacks; 1 disables it. With i the output under the
    image of `cond` and the text of `uncond`: u + image_scale * (i - u) + scale * (c - i) (InstructPix2Pix, eq. 3).
    """
    if uncond is None or scale == image_scale == 1.0:
        return apply_model(x, t, cond)
    if image_scale != 1.0:
        image_only = join_conditions(_with_image_of(cond, uncond), cond)
        three = join_conditions(uncond, image_only)  # each tensor (3B, ...)
        outputs = apply_model(torch.cat([x, x, x]), torch.cat([t, t, t]), three)
        out_uncond, out_image, out_cond = outputs.chunk(3)
        guided = out_uncond + image_scale * (out_image - out_uncond) + scale * (out_cond - out_image)
    elif _parts_differ(uncond, cond):  # a ControlNet's hint for one half alone ("guess mode")
        out_uncond, out_cond = apply_model(x, t, uncond), apply_model(x, t, cond)
        guided = torch.lerp(out_uncond, out_cond, scale)
    else:
        both = join_conditions(uncond, cond)  # each tensor (2B, ...)
        out_uncond, out_cond = apply_model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        guided = torch.lerp(out_uncond, out_cond, scale)
    return guided if rescale == 0.0 else rescale_guidance(guided, out_cond, rescale)


def _with_image_of(cond: Conditioning, uncond: Conditioning) -> Conditioning:
    """The unconditional conditioning with the concat channels of `cond`."""
    if not (isinstance(cond, Mapping) and isinstance(uncond, Mapping) and "c_concat" in cond):
        raise ValueError("image_guidance_scale needs conditions with c_concat, the image that guides")
    return {**uncond, "c_concat": cond["c_concat"]}


def _parts_differ(one: Conditioning, other: Conditioning) -> bool:
    """Return whether two conditions in the normal form have different parts."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return False
    present = ({name for name, part in cond.items() if part is not None} for cond in (one, other))
    return next(present) != next(present)


def rescale_guidance(guided: Tensor, out_cond: Tensor, rescale: float) -> Tensor:
    """Move each sample's standard deviation to that of `out_cond` by `rescale` in [0, 1] (arXiv 2305.08891, 3.4)."""
    std_cond, std_guided = (out.flatten(1).std(dim=1)[:, None, None, None] for out in (out_cond, guided))
    std_guided = std_guided.clamp(min=torch.finfo(guided.dtype).tiny)  # an untrained network returns zeros
    return torch.lerp(guided, guided * (std_cond / std_guided), rescale)


def dynamic_threshold(x0: Tensor, quantile: float) -> Tensor:
    """Clip each sample of x0 (B, C, H, W) to [-s, s] and divide it by s (Imagen, arXiv 2205.11487, section 2.3).

    s is that quantile of the sample's magnitudes, at least 1.
    """
    magnitudes = x0.flatten(1).abs().float().sort(dim=1).values  # torch.quantile does not support large images
    index = max(0, math.ceil(quantile * magnitudes.shape[1]) - 1)
    s = magnitudes[:, index].clamp(min=1.0).to(x0.dtype)[:, None, None, None]
    return torch.maximum(torch.minimum(x0, s), -s) / s
