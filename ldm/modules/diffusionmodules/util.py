"""Small parts of the UNets: n-dimensional convolutions, float32 GroupNorm, checkpointing, timestep embedding.

The functions of `schedule.py` are re-exported, as published.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils.checkpoint import checkpoint as _checkpoint

from ldm.modules.diffusionmodules.schedule import extract_into_tensor as extract_into_tensor
from ldm.modules.diffusionmodules.schedule import make_beta_schedule as make_beta_schedule
from ldm.modules.diffusionmodules.schedule import make_ddim_sampling_parameters as make_ddim_sampling_parameters
from ldm.modules.diffusionmodules.schedule import make_ddim_timesteps as make_ddim_timesteps
from ldm.modules.diffusionmodules.schedule import noise_like as noise_like
from ldm.published import published_names
from ldm.util import mean_flat as mean_flat

M = TypeVar("M", bound=nn.Module)

NORM_GROUPS = 32


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Convolution over `dims` (1, 2 or 3) spatial axes; the other arguments are those of nn.Conv2d."""
    return _class_for(dims, nn.Conv1d, nn.Conv2d, nn.Conv3d)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Average pool over `dims` (1, 2 or 3) spatial axes; the other arguments are those of nn.AvgPool2d."""
    return _class_for(dims, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)(*args, **kwargs)


def _class_for(dims: int, *classes: type[nn.Module]) -> type[nn.Module]:
    if dims not in (1, 2, 3):
        raise ValueError(f"dims={dims!r}: expected one of 1, 2, 3")
    return classes[dims - 1]


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """nn.Linear, under the name that published code imports."""
    return nn.Linear(*args, **kwargs)


class GroupNorm32(nn.GroupNorm):
    """Group normalization with float32 statistics; the output has the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)  # torch accumulates 16-bit inputs in float32: no copy needed
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def normalization(channels: int, eps: float = 1e-5, num_groups: int = NORM_GROUPS) -> GroupNorm32:
    """GroupNorm in float32; eps is 1e-5 in the UNet's blocks and 1e-6 in spatial transformers and first stages."""
    if channels % num_groups:
        raise ValueError(
            f"GroupNorm: {channels} channels are not a multiple of {num_groups} groups; change model_channels or "
            "channel_mult (or in_channels of the block)"
        )
    return GroupNorm32(num_groups, channels, eps=eps)


def zero_module(module: M) -> M:
    """Set every parameter to zero, so that a residual branch starts as the identity; return the module."""
    for p in module.parameters():
        p.detach().zero_()
    return module


def scale_module(module: M, scale: float) -> M:
    """Multiply every parameter by `scale`; return the module."""
    for p in module.parameters():
        p.detach().mul_(scale)
    return module


def repeat_batch(x: Tensor, size: int) -> Tensor:
    """Repeat x (B, ...) along the batch to (size, ...), a multiple of B; x itself if it has that size."""
    return x if x.shape[0] == size else torch.cat([x] * (size // x.shape[0]))  # `repeat` would lose channels_last


def is_own(module: nn.Module, *methods: str) -> bool:
    """Return whether these methods of a module are those that its class, or a base of it, was written with.

    A replaced method is seen by the file of its code, also if it takes the name of the original (functools.wraps).
    """
    files = {getattr(sys.modules.get(each.__module__), "__file__", None) for each in type(module).__mro__}
    for name in methods:
        code = getattr(getattr(type(module), name), "__code__", None)
        if name in vars(module) or code is None or code.co_filename not in files:
            return False
    return True


def is_unchanged(module: nn.Module) -> bool:
    """Return whether a module of this package or torch computes with its own forward: not replaced, without hooks."""
    if module._forward_hooks or module._forward_pre_hooks or type(module).__call__ is not nn.Module.__call__:
        return False
    own = [name for name in ("forward", "_forward") if hasattr(type(module), name)]
    return type(module).__module__.split(".")[0] in ("ldm", "torch") and is_own(module, *own)


def has_global_hooks() -> bool:
    """Return whether hooks of all modules are registered."""
    return bool(_module._global_forward_hooks or _module._global_forward_pre_hooks)


def checkpoint(
    func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[nn.Parameter] | None = None, flag: bool = True
) -> Any:
    """Return func(*inputs); with `flag`, recompute its activations in the backward pass instead of storing them.

    Parameters and inputs without gradient are supported. `params` is part of the published signature and unused.
    """
    if flag and torch.is_grad_enabled():
        return _checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False) -> Tensor:
    """Sinusoidal embedding, cosines first (DDPM, arXiv 2006.11239, appendix B; `model.py` has sines first).

    timesteps: (B,), integer or fractional -> (B, dim) float32; with `repeat_only` the timestep itself, `dim` times.
    """
    if repeat_only:
        return timesteps[:, None].expand(-1, dim).contiguous()
    half = dim // 2
    indices = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    args = timesteps[:, None].float() * torch.exp(-math.log(max_period) * indices / half)  # (B, half); not half - 1
    embedding = torch.cat([args.cos(), args.sin()], dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


__getattr__ = published_names(__name__)
