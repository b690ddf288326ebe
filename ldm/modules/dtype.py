"""Calls of networks with 16-bit weights: the input is cast to their dtype, the output back to the input's."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def weights_dtype(module: nn.Module) -> torch.dtype | None:
    """Dtype of the module's first floating-point weight, or None."""
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), None)


def in_dtype(dtype: torch.dtype | None, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x) computed in `dtype` and returned in the dtype of x, contiguous; plain f(x) if they agree or `dtype` is None.

    Contiguous, because noise sampled in the layout of a tensor would differ in another layout.
    """
    if dtype is None or x.dtype == dtype:
        return f(x)
    return f(x.to(dtype)).to(x.dtype, memory_format=torch.contiguous_format)
