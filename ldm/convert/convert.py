"""Conversion of weights to a diffusers folder and back; scripts/convert.py is its command line."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.atomic import save_text
from ldm.checkpoint import WeightsSource, open_weights, read_weights, refuse_adapters, write_weights
from ldm.checkpoint.diffusers import plan as plans
from ldm.checkpoint.diffusers import text
from ldm.checkpoint.diffusers.files import as_json
from ldm.checkpoint.diffusers.plan import Component, Plan, plan_of
from ldm.checkpoint.diffusers.read import EXTRAS, check_folder, read_folder, scale_factor_of
from ldm.checkpoint.diffusers.rules import to_theirs
from ldm.checkpoint.diffusers.write import WEIGHTS, check_target, new_folder, save_tensors
from ldm.convert.parity import check_component
from ldm.modules.encoders.tokenizers import BEGIN, END, clip_tokenizer

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TRAINING_ONLY = ("model_ema.", "loss.", f"{plans.STAGE}loss.", f"{plans.STAGE}model_ema.", f"{plans.CONDITION}loss.")
_FORMAT = "0.30.0"  # version of diffusers whose layout is written
Weights = Mapping[str, Tensor]


class Conversion(NamedTuple):
    """Result of a conversion."""

    target: Path
    tensors: int
    worst: float  # largest relative difference of a block's output in the parity check
    seconds: float


def to_folder(
    config: Mapping[str, Any],
    ckpt: Path | WeightsSource,
    target: Path,
    dtype: str | None = None,
    use_ema: bool = False,
    scheduler: str = "ddim",
) -> Conversion:
    """Convert the weights of `config` (with its key `model`) to a diffusers folder `target`, which must not exist.

    dtype: fp32, fp16 or bf16; None keeps the weights'. use_ema: convert the averages. scheduler: ddim or pndm.
    Raises CheckpointError or ConversionError in one line; then nothing is written.
    """
    start, plan = time.perf_counter(), plan_of(config, scheduler)
    check_target(target)
    source = open_weights(ckpt)
    names = [part.prefix + rule.ours for part in plan.components for rule in part.layout.rules()]
    weights, taken = _cast(read_weights(source, use_ema, wanted=names), dtype), set(names)
    refuse_adapters(source.path, weights)
    if "scale_factor" in weights:
        plan = plan_of(config, scheduler, float(weights["scale_factor"]))
    logger.info("%s: %d tensors to convert", source.path, len(weights))
    if plan.pipeline is None and plan.scheduler is not None:
        logger.info("diffusers has no pipeline for this model: writing its components without a model_index.json")
    worst, files = 0.0, {}
    for part in plan.components:
        files[Path(part.folder) / part.weights_name], difference = _converted(part, weights)
        worst = max(worst, difference)
    files |= _other_files(plan, {name: tensor for name, tensor in weights.items() if name not in taken})
    with new_folder(target) as folder:
        for path, tensors in files.items():
            save_tensors(tensors, folder / path)
            size = sum(tensor.nbytes for tensor in tensors.values())
            logger.info("%s: %d tensors, %.2f GB", path, len(tensors), size / 1e9)
        for name, content in _configs(plan).items():
            save_text(folder / name, content)
        own = OmegaConf.to_yaml(OmegaConf.create({"model": config["model"]}))
        save_text(folder / "config.yaml", own)  # for loading it here
    return Conversion(target, sum(map(len, files.values())), worst, time.perf_counter() - start)


def to_file(config: Mapping[str, Any], folder: Path, target: Path, dtype: str | None = None) -> Conversion:
    """Convert a diffusers folder to one file of `config`, .ckpt or .safetensors; `target` must not exist.

    Raises CheckpointError or ConversionError in one line, also if the folder's configs differ from the YAML's; then
    nothing is written.
    """
    start, plan = time.perf_counter(), plan_of(config)
    check_target(target, WEIGHTS)
    check_folder(folder, plan)
    weights = _cast(read_folder(folder, plan.text.kind if plan.text else None), dtype)
    logger.info("%s: %d tensors to convert", folder, len(weights))
    worst = max(_converted(part, weights)[1] for part in plan.components)
    if plan.condition_file and not any(name.startswith(plans.CONDITION) for name in weights):
        logger.warning("%s: %s is missing; the file will lack the condition stage", folder, plan.condition_file)
    if plan.shared_condition:
        stage = {name: tensor for name, tensor in weights.items() if name.startswith(plans.STAGE)}
        weights |= {plans.CONDITION + name.removeprefix(plans.STAGE): tensor for name, tensor in stage.items()}
    if plan.text is not None and plan.text.kind == text.CLIP:
        weights[text.POSITION_IDS] = torch.arange(plan.text.positions)[None]  # published files hold it
    if plan.scheduler is not None and plan.scale_factor is None and "scale_factor" not in weights:
        weights["scale_factor"] = torch.tensor(scale_factor_of(folder) or 1.0)
    write_weights(weights, target)
    return Conversion(target, len(weights), worst, time.perf_counter() - start)


def to_one_file(source: WeightsSource, target: Path, dtype: str | None = None, use_ema: bool = False) -> int:
    """Write all weights of a file or of a sharded checkpoint as one file, `target` -> the number of tensors.

    use_ema: the averages in place of the trained weights; without it a file has both, as published.
    Raises CheckpointError or ConversionError in one line; then nothing is written.
    """
    check_target(target, WEIGHTS)
    weights = _cast(read_weights(source, use_ema), dtype)
    refuse_adapters(source.path, weights)
    positions = weights.get(text.POSITION_IDS.replace("position_ids", "position_embedding.weight"))
    if positions is not None:
        weights[text.POSITION_IDS] = torch.arange(len(positions))[None]  # published files hold it
    write_weights(weights, target)
    return len(weights)


# ------------------------------------------------------------------------------------------------------------- weights


def _cast(weights: Weights, dtype: str | None) -> dict[str, Tensor]:
    """Weights in another precision; the model's own tables and scalars (names without a dot) keep theirs."""
    if dtype is None:
        return dict(weights)
    to = DTYPES[dtype]
    return {name: t.to(to) if "." in name and t.is_floating_point() else t for name, t in weights.items()}


def _converted(part: Component, weights: Weights) -> tuple[dict[str, Tensor], float]:
    """A component's tensors under diffusers' names, after its parity check, and the worst relative difference found."""
    start = time.perf_counter()
    own = {name.removeprefix(part.prefix): tensor for name, tensor in weights.items() if name.startswith(part.prefix)}
    theirs = to_theirs(part.layout.rules(), own, part.name)
    parity, seconds = check_component(part, own, theirs), time.perf_counter() - start
    logger.info("%s: %d blocks agree within %.1e (%.1f s)", part.name, parity.blocks, parity.worst, seconds)
    return theirs, parity.worst


def _other_files(plan: Plan, rest: Weights) -> dict[Path, dict[str, Tensor]]:
    """Files for weights outside the components: those of the condition stage, and what diffusers has no place for."""
    training = [name for name in rest if name.startswith(_TRAINING_ONLY)]
    if training:
        logger.info("skipped %d tensors used in training only (losses, averages)", len(training))
    condition = {name: t for name, t in rest.items() if name.startswith(plans.CONDITION) and name not in training}
    extras = {name: t for name, t in rest.items() if name not in training}
    files = {}
    if plan.shared_condition or plan.condition_file is not None:
        extras = {name: t for name, t in extras.items() if name not in condition}
    if plan.condition_file is not None and condition:
        inner = {name.removeprefix(plans.CONDITION): tensor for name, tensor in condition.items()}
        files[Path(plan.condition_file)] = inner
    if extras and plan.scheduler is not None:
        files[Path(EXTRAS)] = extras
    elif extras:
        logger.info("left out %d tensors that are not part of %s", len(extras), plan.components[0].name)
    return files


# ------------------------------------------------------------------------------------------------------------- configs


def _configs(plan: Plan) -> dict[str, str]:
    """File name -> content, for every file without weights."""
    files: dict[str, Any] = {str(Path(part.folder) / "config.json"): part.config for part in plan.components}
    if plan.scheduler is not None:
        files["scheduler/scheduler_config.json"] = plan.scheduler
    if (index := plan.model_index()) is not None:
        files["model_index.json"] = index
    for name, config in files.items():
        if "_class_name" in config:
            files[name] = {**config, "_diffusers_version": _FORMAT}
    if plan.text is not None:
        files |= {f"tokenizer/{name}": content for name, content in tokenizer_files(plan.text.kind).items()}
    return {name: content if isinstance(content, str) else as_json(content) for name, content in files.items()}


def tokenizer_files(kind: str) -> dict[str, Any]:
    """The files of tokenizer/. kind: CLIP pads with the end token, OPEN_CLIP with id 0, "!"."""
    tokenizer = clip_tokenizer()
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END if kind == text.CLIP else "!"}
    options = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    return {
        "vocab.json": tokenizer.token_ids,
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in tokenizer.merges), ""]),
        "special_tokens_map.json": special,
        "tokenizer_config.json": options | special,
    }
