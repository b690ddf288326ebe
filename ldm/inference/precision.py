"""Where a model computes and in which numbers: what `--device` and `--precision` mean on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ldm.inference.settings import PRECISIONS

if TYPE_CHECKING:
    import torch
    from torch import nn


class Precision(NamedTuple):
    """What a precision means on a device. Schedules, the sampler's state and guidance are float32 in all of them."""

    name: str  # full, autocast, bf16 or fp16: what `auto` has become
    weights: torch.dtype
    autocast: torch.dtype | None = (
        None  # what convolutions and products are computed in, where the weights are not in it
    )

    def __str__(self) -> str:
        weights = f"{self.name}: weights in {str(self.weights).removeprefix('torch.')}"
        return (
            weights if self.autocast is None else f"{weights}, computed in {str(self.autocast).removeprefix('torch.')}"
        )


def choose_device(name: str = "auto") -> torch.device:
    """`auto`: CUDA, then MPS, then the CPU; any other name must be a device that is there, else ValueError with those that are."""
    import torch

    there = [f"cuda:{k}" for k in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    there += ["mps"] if torch.backends.mps.is_available() else []
    there += ["cpu"]
    wanted = there[0] if name == "auto" else "cuda:0" if name == "cuda" else name
    if wanted not in there:
        raise ValueError(f"--device {name}: not on this machine; choose auto, {', '.join(there)}")
    return torch.device(wanted)


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """What `precision` means on `device`; ValueError for an unknown name, and for 16-bit weights that the device cannot compute with.

    auto: bf16 where the device has instructions for bfloat16, else full. full: float32. bf16, fp16: weights of 16 bits.
    autocast: float32 weights, computed in half precision on a GPU as published, in bfloat16 on a CPU with instructions for it.
    """
    import torch

    if precision not in PRECISIONS:
        raise ValueError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        precision = "bf16" if has_bfloat16(device) else "full"
    if precision == "full":
        return Precision("full", torch.float32)
    if precision == "autocast":
        if device.type == "cpu":
            return Precision("autocast", torch.float32, torch.bfloat16 if has_bfloat16(device) else None)
        return Precision("autocast", torch.float32, torch.float16)
    numbers = Precision(precision, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])
    _check_computes(numbers, device)
    return numbers


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16: CUDA from Ampere on, CPUs with AMX or AVX-512 bf16."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        can = torch.cpu.get_capabilities()
        return bool(can.get("amx_bf16") or can.get("avx512_bf16"))
    asked = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(supported() for supported in asked if supported is not None)


def _check_computes(numbers: Precision, device: torch.device) -> None:
    """Compute a little of everything that the networks are made of: what is missing is known before gigabytes are read."""
    import torch
    import torch.nn.functional as F

    try:
        x = torch.zeros(1, 32, 2, 2, dtype=numbers.weights, device=device)
        x = F.silu(F.group_norm(F.conv2d(x, x.expand(32, -1, -1, -1), padding=1), 32))
        x = F.interpolate(x, scale_factor=2, mode="nearest").flatten(2)
        x = F.layer_norm(F.gelu(F.linear(x, x[0])), (32,))
        F.scaled_dot_product_attention(x, x, x).sum()
    except (RuntimeError, TypeError) as error:
        others = ", ".join(name for name in PRECISIONS if name != numbers.name)
        what = f"{device.type} cannot compute in {numbers.weights}".replace("torch.", "")
        raise ValueError(
            f"--precision {numbers.name}: {what} ({str(error).splitlines()[0]}); choose one of {others}"
        ) from error


def cast_weights(module: nn.Module, dtype: torch.dtype, channels_last: bool = False) -> None:
    """Give the weights of a module that is still on the meta device the dtype and the layout that a file is to be read into.

    Modules with a true `keeps_float32` (a codebook, whose nearest entry rounding would change) and buffers stay as they are.
    channels_last: 2d convolutions hold theirs with the channels innermost, which suits bfloat16 on a CPU; feature maps follow them.
    """
    import torch
    from torch import nn

    if getattr(module, "keeps_float32", False):
        return
    for name, weight in list(module.named_parameters(recurse=False)):
        if weight.is_meta and weight.is_floating_point():
            last = (
                channels_last and isinstance(module, nn.Conv2d) and weight.ndim == 4 and weight[0, 0].numel() > 1
            )  # else both are one
            layout = torch.channels_last if last else torch.preserve_format
            setattr(
                module, name, nn.Parameter(weight.to(dtype, memory_format=layout), requires_grad=weight.requires_grad)
            )
    for child in module.children():
        cast_weights(child, dtype, channels_last)
