"""Networks with 16-bit weights: calls that cast the input to their dtype and the output back, tables in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Float32Tables(nn.Module):
    """Base of modules whose own floating-point buffers stay in float32 when a cast to 16 bits changes their weights.

    Half precision rounds the ends of a noise schedule away: the SNR of 1 - alphas_cumprod there, and loss weights.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Tables:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, table in before.items():
            moved = self._buffers[name]
            if table is not None and moved is not None and moved.itemsize < table.itemsize:
                self._buffers[name] = table.to(moved.device)
        return self


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
