"""The published thresholds of a predicted x_0; `dynamic_threshold` of SamplingOptions is Imagen's."""

from __future__ import annotations

from torch import Tensor


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """Append axes of size 1 until x has `target_dims`. Raises ValueError if it has more."""
    if x.ndim > target_dims:
        raise ValueError(f"input has {x.ndim} dims but target_dims is {target_dims}, which is less")
    return x.reshape(*x.shape, *(1 for _ in range(target_dims - x.ndim)))


def norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Scale each sample of x0 (B, ...) whose root mean square is above `value` down to it."""
    rms = x0.pow(2).flatten(1).mean(1).sqrt().clamp(min=value)  # (B,)
    return x0 * (value / append_dims(rms, x0.ndim))


def spatial_norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Scale each pixel of x0 (B, C, H, W) whose root mean square over the channels is above `value` down to it."""
    return x0 * (value / x0.pow(2).mean(1, keepdim=True).sqrt().clamp(min=value))
