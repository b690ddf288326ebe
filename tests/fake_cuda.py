"""Fake CUDA tensors: the shapes, dtypes and devices of tensors on a GPU, without a GPU and without values.

A tensor left on the CPU is a device mismatch, and code that reads a value on the host (`item`, `bool`, `tolist`, an
index by a mask) is a data-dependent access: both raise. A copy between host and device needs no values, so
`no_transfers` refuses it where code must neither wait for the device nor upload.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)


class FakeCuda(FakeTensorMode):
    """Mode in which every new tensor is fake, also those of device "cuda"."""

    def moved(self, values: Any) -> Any:
        """Fake tensors on the GPU of the shapes and dtypes of the tensors in a nest of containers."""
        return tree_map_only(
            Tensor, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA), values
        )

    def move(self, module: Any) -> Any:
        """Replace the parameters and buffers of a module by fake ones on the GPU, in place."""
        module._apply(self.moved)
        for part in module.modules():
            if hasattr(part, "_device"):  # Lightning's, which it sets in `to`
                part._device = CUDA
        return module


FAKE = FakeCuda()  # one for all tests: tensors of different modes do not mix


class no_transfers(TorchDispatchMode):
    """Scope in which a copy from the host to the device or back raises RuntimeError."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            given = {leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
            target = kwargs.get("device")
            if len(given | ({torch.device(target).type} if target is not None else set())) > 1:
                raise RuntimeError(f"{func}: a copy between host and device")
        return func(*args, **kwargs)


def require_cuda(values: Any) -> None:
    """Raise AssertionError if a tensor is not on the GPU."""
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    assert leaves and all(leaf.device == CUDA for leaf in leaves), [leaf.device for leaf in leaves]


class Gain(nn.Module):
    """A network of one parameter with 4 output channels, for losses."""

    num_classes = 11

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, **parts: Any) -> Tensor:
        return self.gain * x[:, :4] + t[:, None, None, None]
