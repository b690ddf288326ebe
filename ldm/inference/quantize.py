"""Weights of 8 or 4 bits (torchao): linear layers keep quantized weights and compute in the model's precision."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ldm.inference.offload import in_use
from ldm.inference.precision import resolve_precision
from ldm.inference.settings import QUANTIZATIONS, check_quantize

logger = logging.getLogger(__name__)

GROUP = 64  # values of a row that share a scale, in int4
_TRIED = 256  # width of the layer that `check_quantization` tries


def check_quantization(name: str, device: torch.device, precision: str) -> None:
    """Raise ValueError for an unknown name or weights that the device does not compute with in this precision.

    Raises ImportError without torchao.
    """
    check_quantize(name)
    dtype = resolve_precision(precision, device).weights
    layer = nn.Linear(_TRIED, _TRIED, bias=False, device=device, dtype=dtype)
    try:
        _quantize(layer, name)
        layer(torch.zeros(2, _TRIED, device=device, dtype=dtype))
    except (RuntimeError, ValueError, AssertionError, ImportError) as error:  # an ImportError names missing kernels
        others = ", ".join(other for other in QUANTIZATIONS if other != name)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        what = f"{device.type} does not compute {name} weights with {dtype}".replace("torch.", "")
        raise ValueError(
            f"--quantize {name}: {what} ({reason}); choose another precision or one of {others}"
        ) from error


@torch.no_grad()
def quantize_weights(networks: Collection[nn.Module], name: str) -> None:
    """Quantize the linear layers of networks, and log what keeps its dtype.

    int8, fp8: a scale for each row of a weight. int4: a scale for each group of 64 values. Convolutions, embeddings and
    layers whose rows are no multiple of the group keep their dtype.
    """
    done = 0
    for network in networks:
        with in_use(network):
            for layer in network.modules():
                if type(layer) is nn.Linear and not (name == "int4" and layer.in_features % GROUP):
                    _quantize(layer, name)
                    done += layer.weight.numel()
    kept = sum(parameter.numel() for network in networks for parameter in network.parameters()) - done
    text = "%s weights: %.1f M values of linear layers; %.1f M keep their dtype (convolutions, embeddings and the like)"
    logger.info(text, name, done / 1e6, kept / 1e6)


def _quantize(layer: nn.Linear, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import quantize_  # optional, and slow to import

        quantize_(layer, _config(name), filter_fn=lambda module, path: isinstance(module, nn.Linear))
    layer.weight.requires_grad_(False)


def _config(name: str) -> Any:
    from torchao import quantization

    if name == "int8":
        return quantization.Int8WeightOnlyConfig()
    if name == "fp8":
        return quantization.Float8WeightOnlyConfig()
    return quantization.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
