"""Classifier-free guidance, its rescaling, and the thresholding of predictions that large guidance scales need."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.conditioning import Conditioning, join_conditions, map_tensors
from ldm.modules.run_constants import RunConstants


class GuidedNetwork:
    """Network under classifier-free guidance, u + scale * (c - u) (Ho & Salimans 2022, eq. 6, w = scale - 1).

    Without `uncond`, or at scales of 1, this is the plain call. `rescale`: see `rescale_guidance`.
    image_scale: guidance by the image in `c_concat`, which `uncond` lacks; 1 disables it. With i the output under the
    image of `cond` and the text of `uncond`: u + image_scale * (i - u) + scale * (c - i) (InstructPix2Pix, eq. 3).
    The conditions are joined to one batch once, at the first guided call.
    """

    def __init__(
        self,
        apply_model: Callable[[Tensor, Tensor, Conditioning], Tensor],
        cond: Conditioning,
        uncond: Conditioning,
        scale: float,
        rescale: float = 0.0,
        image_scale: float = 1.0,
    ) -> None:
        self.apply_model, self.cond, self.uncond = apply_model, cond, uncond
        self.scale, self.rescale, self.image_scale = scale, rescale, image_scale
        self.guides = uncond is not None and not scale == image_scale == 1.0
        self.constants = RunConstants()
        map_tensors(self.constants.add, [cond, uncond])

    @cached_property
    def repeats_inputs(self) -> bool:
        """True if the network takes inputs (B, ...) with the joined conditions, and repeats them where these differ."""
        owner: Any = getattr(self.apply_model, "__self__", None)
        return hasattr(type(owner), "repeats_inputs") and owner.repeats_inputs  # a wrapper's attributes are the model's

    @cached_property
    def joined(self) -> Conditioning:
        """The conditions as one batch, each tensor (2B, ...), or (3B, ...) with image guidance; None if they differ."""
        if self.image_scale != 1.0:
            image_only = join_conditions(_with_image_of(self.cond, self.uncond), self.cond)
            return map_tensors(self.constants.add, join_conditions(self.uncond, image_only))
        if _parts_differ(self.uncond, self.cond):  # a ControlNet's hint for one half alone ("guess mode")
            return None
        return map_tensors(self.constants.add, join_conditions(self.uncond, self.cond))

    def __call__(self, x: Tensor, t: Tensor, guided: bool = True) -> Tensor:
        """Return the output (B, C, H, W), in the model's own parameterization; without guidance if not `guided`.

        x: (B, C, H, W), t: (B,) int64, or float for continuous-time samplers.
        """
        with self.constants.in_use():
            return self._guided(x, t) if guided and self.guides else self.apply_model(x, t, self.cond)

    def _guided(self, x: Tensor, t: Tensor) -> Tensor:
        if self.image_scale != 1.0:
            out_uncond, out_image, out_cond = self._outputs(x, t, 3)
            out = out_uncond + self.image_scale * (out_image - out_uncond) + self.scale * (out_cond - out_image)
        else:
            if self.joined is None:
                out_uncond, out_cond = self.apply_model(x, t, self.uncond), self.apply_model(x, t, self.cond)
            else:
                out_uncond, out_cond = self._outputs(x, t, 2)
            out = torch.lerp(out_uncond, out_cond, self.scale)
        return out if self.rescale == 0.0 else rescale_guidance(out, out_cond, self.rescale)

    def _outputs(self, x: Tensor, t: Tensor, conditions: int) -> tuple[Tensor, ...]:
        """Outputs (B, C, H, W) under each of the joined conditions."""
        if not self.repeats_inputs:
            x, t = torch.cat([x] * conditions), torch.cat([t] * conditions)
        return self.apply_model(x, t, self.joined).chunk(conditions)


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
