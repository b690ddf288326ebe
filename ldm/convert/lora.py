"""LoRA files between kohya's and diffusers' names, and merged into a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ldm.checkpoint import open_weights, weights_on_meta, write_weights
from ldm.checkpoint.diffusers.lora import KOHYA, LoraNames, read_lora, write_lora
from ldm.checkpoint.diffusers.rules import ConversionError
from ldm.checkpoint.diffusers.write import WEIGHTS, check_target
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_info import model_info
from ldm.inference.lora import merged, read_adapters, split_adapter
from ldm.inference.pipeline import for_inference
from ldm.modules.adapters.lora import adaptable, networks_of


class Written(NamedTuple):
    """Result of a conversion or a merge."""

    target: Path
    layers: int  # that the adapters change
    seconds: float


def convert_lora(config: Mapping[str, Any], source: Path, target: Path, style: str = KOHYA) -> Written:
    """Write the LoRA of a file or folder in a style of names; `target` must not exist.

    Raises CheckpointError or ConversionError in one line for a LoRA that does not fit the model of `config`.
    """
    start = time.perf_counter()
    check_target(target, [".safetensors"])
    names = LoraNames(adaptable(networks_of(_on_meta(config))), config)
    adapters = read_lora(source, names)
    write_lora(adapters, target, names, style)
    return Written(target, len(adapters), time.perf_counter() - start)


def merge_lora(config: Mapping[str, Any], ckpt: Path, files: Sequence[tuple[Path, float]], target: Path) -> Written:
    """Write weights with (LoRA, strength) merged in, and with the LoRA that their run trained; `target` must not exist.

    ckpt: a file or a diffusers folder. Weights and averages are both changed; the others, and all dtypes, stay.
    Raises CheckpointError or ConversionError in one line; then nothing is written.
    """
    start = time.perf_counter()
    check_target(target, WEIGHTS)
    source = open_weights(ckpt)
    source.check(config)
    weights, trained = split_adapter(source.path, source.tensors(), config, model_info(config).use_ema)
    adapters = [*trained, *read_adapters(files, _on_meta(config), config)]
    if not adapters:
        raise ConversionError(f"{source.path}: no run with the section adapters, so nothing to merge: pass --lora FILE")
    write_weights(merged(weights, adapters), target)
    return Written(target, len({key for adapter in adapters for key in adapter.layers}), time.perf_counter() - start)


def _on_meta(config: Mapping[str, Any]) -> nn.Module:
    """The model of a config (with its key `model`), which reads no weights."""
    with weights_on_meta():
        return instantiate_from_config(for_inference(config, {"first_stage_model.", "cond_stage_model."}).model)
