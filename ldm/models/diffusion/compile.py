"""`torch.compile` of a denoising network, in place."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

from torch import nn

from ldm.config.instantiate import ConfigError


def compile_network(network: nn.Module, backend: str = "inductor", **options: Any) -> None:
    """Compile the forward pass of `network` at its first call; unlike torch.compile(module), it keeps the keys.

    options: further arguments of torch.compile. Raises ConfigError, see `check_compiler`.
    """
    check_compiler(backend, next((parameter.device.type for parameter in network.parameters()), "cpu"))
    network.compile(backend=backend, **options)


def check_compiler(backend: str, device_type: str) -> None:
    """Raise ConfigError if `backend` lacks what it generates code with: a C++ compiler, or triton on CUDA."""
    if backend != "inductor":
        return
    compilers = [os.environ.get("CXX"), "g++", "clang++", "cl"]
    if device_type == "cpu" and not any(each and shutil.which(each) for each in compilers):
        raise ConfigError("--compile inductor: needs a C++ compiler on the CPU; install g++, or choose aot_eager")
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError("--compile inductor: needs triton on CUDA; pip install triton, or choose aot_eager")
