"""Meaning of `--device` and `--precision` on this machine."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ldm.inference.settings import PRECISIONS


class Precision(NamedTuple):
    """Dtypes of a precision on a device. Schedules, the sampler's state and guidance are float32 in all of them."""

    name: str  # full, autocast, bf16 or fp16 (`auto` resolved)
    weights: torch.dtype
    autocast: torch.dtype | None = None  # of convolutions and matrix products, if different from the weights' dtype

    def __str__(self) -> str:
        text = f"{self.name}: weights in {self.weights}"
        text += "" if self.autocast is None else f", computed in {self.autocast}"
        return text.replace("torch.", "")


def choose_device(name: str = "auto") -> torch.device:
    """Resolve `auto` to CUDA, MPS or the CPU; raise ValueError, with the choices, for an unavailable device."""
    available = [f"cuda:{k}" for k in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    available += ["cpu"]
    wanted = available[0] if name == "auto" else "cuda:0" if name == "cuda" else name
    if wanted not in available:
        raise ValueError(f"--device {name}: not available on this machine; choose auto, {', '.join(available)}")
    return torch.device(wanted)


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Resolve a precision for a device; raise ValueError for an unknown name and for an unsupported dtype.

    auto: bf16 if the device has bfloat16 instructions, else full. full: float32. bf16, fp16: 16-bit weights.
    autocast: float32 weights, computed in float16 on a GPU as published, in bfloat16 on a CPU that supports it.
    """
    if name not in PRECISIONS:
        raise ValueError(f"--precision {name}: choose one of {', '.join(PRECISIONS)}")
    if name == "auto":
        name = "bf16" if has_bfloat16(device) else "full"
    if name == "full":
        return Precision("full", torch.float32)
    if name == "autocast":
        if device.type == "cpu":
            return Precision("autocast", torch.float32, torch.bfloat16 if has_bfloat16(device) else None)
        return Precision("autocast", torch.float32, torch.float16)
    precision = Precision(name, {"bf16": torch.bfloat16, "fp16": torch.float16}[name])
    _try_layers(precision, device)
    return precision


def has_bfloat16(device: torch.device) -> bool:
    """True for devices with bfloat16 instructions: CUDA from Ampere on, CPUs with AMX or AVX-512 bf16."""
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    probes = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(probe() for probe in probes if probe is not None)


def _try_layers(precision: Precision, device: torch.device) -> None:
    """Run one small layer of each kind, so that a missing kernel is reported before gigabytes are read."""
    try:
        x = torch.zeros(1, 32, 2, 2, dtype=precision.weights, device=device)
        x = F.silu(F.group_norm(F.conv2d(x, x.expand(32, -1, -1, -1), padding=1), 32))
        x = F.interpolate(x, scale_factor=2, mode="nearest").flatten(2)
        x = F.layer_norm(F.gelu(F.linear(x, x[0])), (32,))
        F.scaled_dot_product_attention(x, x, x).sum()
    except (RuntimeError, TypeError) as error:
        others = ", ".join(name for name in PRECISIONS if name != precision.name)
        what = f"{device.type} cannot compute in {precision.weights}".replace("torch.", "")
        raise ValueError(
            f"--precision {precision.name}: {what} ({str(error).splitlines()[0]}); choose one of {others}"
        ) from error


def cast_weights(module: nn.Module, dtype: torch.dtype, channels_last: bool = False) -> None:
    """Cast the weights of a module on the meta device, so that a file is read into this dtype and layout.

    Buffers and modules with a true `keeps_float32` (a codebook, whose nearest entry would change) are left alone.
    channels_last: memory format of 2d convolutions, which suits bfloat16 on a CPU.
    """
    if getattr(module, "keeps_float32", False):
        return
    for name, weight in list(module.named_parameters(recurse=False)):
        if weight.is_meta and weight.is_floating_point():
            last = channels_last and isinstance(module, nn.Conv2d) and weight.ndim == 4
            last = last and weight[0, 0].numel() > 1  # of a 1x1 kernel both layouts are one
            layout = torch.channels_last if last else torch.preserve_format
            cast = weight.to(dtype, memory_format=layout)
            setattr(module, name, nn.Parameter(cast, requires_grad=weight.requires_grad))
    for child in module.children():
        cast_weights(child, dtype, channels_last)
