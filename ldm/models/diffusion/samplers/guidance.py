"""The one guided network call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.conditioning import Conditioning, join_conditions


def guided_output(
    model: Any, x: Tensor, t: Tensor, cond: Conditioning, uncond: Conditioning, scale: float, rescale: float = 0.0
) -> Tensor:
    """Network output under classifier-free guidance, u + scale * (c - u)  (Ho & Salimans 2022, eq. 6 with w = scale - 1).

    x: (B, C, H, W), t: (B,) int64, or float for continuous-time solvers (never rounded) -> (B, C, H, W), in the model's
    own parameterization. Without `uncond`, or at scale 1, this is the plain call. `rescale` in [0, 1] moves each sample's
    standard deviation towards that of c.
    """
    if uncond is None or scale == 1.0:
        return model.apply_model(x, t, cond)
    both = join_conditions(uncond, cond)  # each tensor (2B, ...)
    out_uncond, out_cond = model.apply_model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    guided = torch.lerp(out_uncond, out_cond, scale)
    return guided if rescale == 0.0 else rescale_guidance(guided, out_cond, rescale)


def rescale_guidance(guided: Tensor, out_cond: Tensor, rescale: float) -> Tensor:
    """`guided` (B, C, H, W) with the standard deviation of `out_cond`, by the share `rescale` (section 3.4 of arXiv 2305.08891)."""
    std_cond, std_guided = (out.flatten(1).std(dim=1)[:, None, None, None] for out in (out_cond, guided))
    std_guided = std_guided.clamp(
        min=torch.finfo(guided.dtype).tiny
    )  # an untrained network's output is zero everywhere
    return torch.lerp(guided, guided * (std_cond / std_guided), rescale)
