"""Networks whose weights have 16 bits among float32 numbers: what goes in is cast, what comes out is as precise as what went in."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def weights_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's first floating-point weight; None where it has none."""
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), None)


def in_dtype(dtype: torch.dtype | None, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x) computed in `dtype` and given back in the dtype of x, contiguous; f(x) itself where the two agree or `dtype` is None.

    Contiguous, because noise that is drawn in the layout of a tensor would be another noise in another layout.
    """
    return (
        f(x) if dtype is None or x.dtype == dtype else f(x.to(dtype)).to(x.dtype, memory_format=torch.contiguous_format)
    )
