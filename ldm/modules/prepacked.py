"""Convolutions and linear layers on the CPU whose bfloat16 weights stay in oneDNN's blocked format.

oneDNN computes with weights in an order of its own and else makes that copy at every call, which takes as long as the
arithmetic itself where a layer has many weights and a small input.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Prepacked(nn.Module):
    """Layer whose weight is packed at its second call without gradients; its state dict holds the plain weight.

    A process that makes one step does without the time that packing takes.
    """

    weight: Tensor
    called = False

    def pack(self, x: Tensor) -> bool:
        """Pack the weight for inputs like x, if it is not yet; False where the plain layer must compute."""
        if torch.compiler.is_compiling() or not x.dtype == self.weight.dtype == torch.bfloat16 or not x.numel():
            return False
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            return False  # the packed operations have no derivative
        if not self.weight.is_mkldnn:
            if not self.called:
                self.called = True
                return False
            self._set(self._packed(self.weight.detach(), x))
        return True

    def _set(self, weight: Tensor) -> None:
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)

    def _packed(self, weight: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def unpack(self) -> None:
        """Return to the plain weight."""
        if self.weight.is_mkldnn:
            self._set(self.weight.detach().to_dense())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.unpack()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.is_mkldnn:
            destination[f"{prefix}weight"] = self.weight.detach().to_dense()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self.unpack()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied


class PrepackedConv2d(_Prepacked, nn.Conv2d):
    """nn.Conv2d with a packed weight."""

    def forward(self, x: Tensor) -> Tensor:
        circular = self.padding_mode != "zeros" or "_conv_forward" in vars(self)  # as research code tiles images
        if circular or x.ndim != 4 or not self.pack(x):
            self.unpack()
            return super().forward(x)
        layout = self.padding, self.stride, self.dilation, self.groups
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *layout, "none", [], "")

    def _packed(self, weight: Tensor, x: Tensor) -> Tensor:
        layout = self.padding, self.stride, self.dilation, self.groups
        return torch.ops.aten.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *layout, x.shape)


class PrepackedLinear(_Prepacked, nn.Linear):
    """nn.Linear with a packed weight."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.pack(x):
            self.unpack()
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def _packed(self, weight: Tensor, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), x.numel() // x.shape[-1])


def prepack(network: nn.Module) -> None:
    """Let the bfloat16 convolutions and linear layers of a network on the CPU pack their weights at the second call.

    They stay instances of their classes, and their outputs are equal up to bfloat16's rounding. `state_dict` returns
    plain tensors, and `network.to(...)` makes the weights plain again, for code that computes with the parameters.
    Nothing is done on processors without AVX-512, to layers of other classes and to layers with forward hooks, which
    may read the weight.
    """
    if not is_supported():
        return
    packed = {nn.Conv2d: PrepackedConv2d, nn.Linear: PrepackedLinear}
    for layer in network.modules():
        if type(layer) not in packed or layer._forward_hooks:
            continue
        if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
            continue
        if type(layer.weight) is nn.Parameter and layer.weight.dtype == torch.bfloat16:  # not quantized
            layer.__class__ = packed[type(layer)]


def is_supported() -> bool:
    """Return whether this torch and processor compute bfloat16 with oneDNN's packed weights."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
