"""Small layers of the UNets: n-dimensional convolutions, float32 GroupNorm, activation checkpointing, timestep embedding.

The schedule functions that downstream code imports from here live in `schedule.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as _checkpoint

from ldm.modules.diffusionmodules.schedule import (
    extract_into_tensor,
    make_beta_schedule,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    noise_like,
)
from ldm.util import mean_flat

__all__ = [
    "GroupNorm32",
    "avg_pool_nd",
    "checkpoint",
    "conv_nd",
    "extract_into_tensor",
    "linear",
    "make_beta_schedule",
    "make_ddim_sampling_parameters",
    "make_ddim_timesteps",
    "mean_flat",
    "noise_like",
    "normalization",
    "scale_module",
    "timestep_embedding",
    "zero_module",
]

M = TypeVar("M", bound=nn.Module)

NORM_GROUPS = 32
_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A convolution over `dims` (1, 2 or 3) spatial axes; the other arguments are those of nn.Conv2d."""
    return _of_dims(_CONVS, dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """An average pool over `dims` (1, 2 or 3) spatial axes; the other arguments are those of nn.AvgPool2d."""
    return _of_dims(_AVG_POOLS, dims)(*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """nn.Linear, under the name that published code imports."""
    return nn.Linear(*args, **kwargs)


class GroupNorm32(nn.GroupNorm):
    """Group normalization whose statistics are taken in float32, returned in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or x.dtype == self.weight.dtype:
            return super().forward(
                x
            )  # torch's kernels accumulate 16-bit inputs in float32: a copy would only cost memory traffic
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def normalization(channels: int, eps: float = 1e-5) -> GroupNorm32:
    """GroupNorm over 32 groups; eps is 1e-5 in the UNet's blocks and 1e-6 in spatial transformers and first stages."""
    if channels % NORM_GROUPS:
        raise ValueError(
            f"GroupNorm has {NORM_GROUPS} groups and cannot split {channels} channels; choose model_channels and channel_mult "
            f"(or in_channels of the block) so that every level has a multiple of {NORM_GROUPS}"
        )
    return GroupNorm32(NORM_GROUPS, channels, eps=eps)


def zero_module(module: M) -> M:
    """`module` with every parameter set to zero, so that a residual branch starts as the identity."""
    for p in module.parameters():
        p.detach().zero_()
    return module


def scale_module(module: M, scale: float) -> M:
    """`module` with every parameter multiplied by `scale`."""
    for p in module.parameters():
        p.detach().mul_(scale)
    return module


def checkpoint(
    func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[nn.Parameter] | None = None, flag: bool = True
) -> Any:
    """`func(*inputs)`, whose activations are computed again in the backward pass instead of kept, where `flag` is true.

    Frozen parameters and inputs without gradient are fine. `params` is a part of the published signature; autograd finds them itself.
    """
    if flag and torch.is_grad_enabled():
        return _checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False) -> Tensor:
    """Sinusoids of the timesteps, cosines first (DDPM, arXiv 2006.11239, section B; `model.py` has the other order).

    timesteps: (B,), integer or fractional -> (B, dim) float32; `repeat_only` repeats the timestep itself `dim` times instead.
    """
    if repeat_only:
        return timesteps[:, None].expand(-1, dim).contiguous()
    half = dim // 2
    exponents = (
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )  # not half - 1
    args = timesteps[:, None].float() * torch.exp(exponents)  # (B, half)
    embedding = torch.cat([args.cos(), args.sin()], dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def _of_dims(classes: dict[int, type[nn.Module]], dims: int) -> type[nn.Module]:
    if dims not in classes:
        raise ValueError(f"dims={dims!r}: expected one of {', '.join(map(str, classes))}")
    return classes[dims]
