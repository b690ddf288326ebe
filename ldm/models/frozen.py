"""Frozen stages in 16 bits: half the memory of their weights and faster encoding while another network trains."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

FROZEN_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FrozenIn16Bits:
    """A frozen stage with weights in `dtype` until `release`. Its state dict stays that of the weights before the cast.

    Weights that the cast rounds are kept on the CPU. Modules with a true `keeps_float32` (a codebook) are left alone.
    The stage runs under `torch.no_grad`: `torch.inference_mode` would save next to nothing, and a condition that came
    from it cannot be saved for the gradients of the layers that attend to it.
    """

    def __init__(self, stage: nn.Module, dtype: torch.dtype) -> None:
        self._before: dict[nn.Parameter, Tensor | torch.dtype] = {}  # the weight, or its dtype where the cast is exact
        for weight in castable(stage):
            if weight.is_floating_point() and weight.itemsize > dtype.itemsize and weight not in self._before:
                last = weight.ndim == 4 and weight.device.type == "cpu"  # the layout of fast 16-bit convolutions there
                layout = torch.channels_last if last else torch.preserve_format
                cast = weight.detach().to(dtype, memory_format=layout)
                exact = torch.equal(cast.to(weight.dtype), weight)
                self._before[weight] = weight.dtype if exact else weight.detach().cpu()
                weight.data = cast
        self._hook = stage.register_state_dict_post_hook(partial(self._state_before))  # a method takes no mark

    def release(self) -> None:
        """Give the stage the weights that it had before."""
        self._hook.remove()
        for weight in self._before:
            weight.data = self._value(weight).to(weight.device)

    def _value(self, weight: nn.Parameter) -> Tensor:
        before = self._before[weight]
        return weight.detach().to(before).contiguous() if isinstance(before, torch.dtype) else before

    def _state_before(self, stage: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name, weight in stage.named_parameters(remove_duplicate=False):
            if weight in self._before:
                state[prefix + name] = self._value(weight)


def hold_frozen_stages(stages: Mapping[str, Any], precision: str) -> list[FrozenIn16Bits]:
    """Hold the stages of which nothing is trained in a precision of FROZEN_DTYPES; log which. stages: by their names.

    Raises ValueError if there is none.
    """
    frozen = frozen_stages(stages)
    if not frozen:
        raise ValueError(
            f"frozen_precision {precision}: this model has no frozen stage with weights (stages of cached latents are "
            "not built); remove it"
        )
    trained = [name for name, stage in stages.items() if _has_weights(stage) and stage not in frozen]
    also = f" ({', '.join(trained)}: trained, unchanged)" if trained else ""
    logger.info("%-11s %s in %s%s", "frozen", " and ".join(frozen.values()), precision, also)
    return [FrozenIn16Bits(stage, FROZEN_DTYPES[precision]) for stage in frozen]


def frozen_stages(stages: Mapping[str, Any]) -> dict[nn.Module, str]:
    """Return the stages with weights of which nothing is trained, with their names."""
    return {
        stage: name
        for name, stage in stages.items()
        if _has_weights(stage) and not any(weight.requires_grad for weight in stage.parameters())
    }


def _has_weights(stage: Any) -> bool:
    return isinstance(stage, nn.Module) and any(True for _ in stage.parameters())


def castable(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights of a stage that are held in 16 bits: all but those of modules that keep float32."""
    if not getattr(module, "keeps_float32", False):
        yield from module.parameters(recurse=False)
        for child in module.children():
            yield from castable(child)
