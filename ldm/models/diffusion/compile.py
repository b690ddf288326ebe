"""`torch.compile` of a denoising network, in place."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from typing import TYPE_CHECKING, Any

from ldm.cli import one_line
from ldm.config.instantiate import ConfigError

if TYPE_CHECKING:
    from torch import nn  # the flags are checked before torch is imported

logger = logging.getLogger(__name__)


def compile_network(network: nn.Module, backend: str = "inductor", **options: Any) -> None:
    """Compile the forward pass of `network` at its first call; unlike torch.compile(module), it keeps the keys.

    options: further arguments of torch.compile. Raises ConfigError if it does not support this Python or system.
    """
    try:
        network.compile(backend=backend, **options)
    except RuntimeError as error:
        raise ConfigError(f"--compile {backend}: {one_line(error)}; remove the flag") from error


def compile_for_sampling(network: nn.Module, backend: str, device_type: str) -> None:
    """Compile a network whose weights and input sizes stay the same, at its first call without gradients.

    inductor replays CUDA graphs on CUDA, and keeps a copy of the weights in oneDNN's blocked format on the CPU. Raises
    ConfigError, see `check_compiler`.
    """
    check_compiler(backend, device_type)
    static = {"triton.cudagraphs": True} if device_type == "cuda" else {"freezing": device_type == "cpu"}
    logger.info("the first step compiles the UNet with %s, which takes minutes for a large one", backend)
    compile_network(network, backend, dynamic=False, **({"options": static} if backend == "inductor" else {}))


def check_compiler(backend: str, device_type: str) -> None:
    """Raise ConfigError if `backend` lacks what it generates code with: a C++ compiler, or triton on CUDA."""
    if backend != "inductor":
        return
    compilers = [os.environ.get("CXX"), "g++", "clang++", "cl"]
    if device_type == "cpu" and not any(each and shutil.which(each) for each in compilers):
        raise ConfigError("--compile inductor: needs a C++ compiler on the CPU; install g++, or choose aot_eager")
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError("--compile inductor: needs triton on CUDA; pip install triton, or choose aot_eager")
