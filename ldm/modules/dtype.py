"""Calls of networks with 16-bit weights: cast the input to their dtype, and the output back."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def weights_dtype(module: nn.Module) -> torch.dtype | None:
    """Dtype of the module's first floating-point weight, or None."""
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), None)


def is_quantized(weight: Tensor) -> bool:
    """True for a tensor of a class of its own, as torchao's quantized weights."""
    return type(weight) not in (Tensor, nn.Parameter)


def values_of(weight: Tensor) -> Tensor:
    """A weight's values in float32, without gradient; a quantized one is dequantized."""
    weight = weight.detach()
    return (weight.dequantize() if is_quantized(weight) else weight).float()


def in_dtype(dtype: torch.dtype | None, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x) computed in `dtype` and returned in the dtype of x; plain f(x) if these are equal or `dtype` is None.

    A cast output is contiguous: noise sampled like a tensor depends on its memory layout.
    """
    if dtype is None or x.dtype == dtype:
        return f(x)
    return f(x.to(dtype)).to(x.dtype, memory_format=torch.contiguous_format)
