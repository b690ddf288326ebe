"""Weights to a diffusers folder and back: what scripts/convert.py does."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.checkpoint.diffusers import plan as plans
from ldm.checkpoint.diffusers import text
from ldm.checkpoint.diffusers.files import as_json
from ldm.checkpoint.diffusers.plan import Component, Plan, plan_of
from ldm.checkpoint.diffusers.read import EXTRAS, check_folder, read_folder, scale_factor_of
from ldm.checkpoint.diffusers.rules import ConversionError, to_theirs
from ldm.checkpoint.diffusers.write import check_target, new_folder, save_tensors
from ldm.modules.encoders.tokenizers import BEGIN, END, clip_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_TRAINING_ONLY = ("model_ema.", "loss.", f"{plans.STAGE}loss.", f"{plans.STAGE}model_ema.", f"{plans.CONDITION}loss.")
_FORMAT = "0.30.0"  # the version of diffusers whose layout is written


class Conversion(NamedTuple):
    """What was done: the file or folder, its tensors, the largest relative difference that the parity check met, and seconds."""

    target: Path
    tensors: int
    worst: float
    seconds: float


def to_folder(
    config: Mapping[str, Any],
    ckpt: Path,
    target: Path,
    dtype: str | None = None,
    use_ema: bool = False,
    scheduler: str = "ddim",
) -> Conversion:
    """A weights file of `config` (with its key `model`) as a diffusers folder `target`, which must not exist.

    dtype: fp32, fp16 or bf16; None keeps the file's. use_ema: its averaged weights. scheduler: ddim or pndm.
    Raises ConversionError or CheckpointError in one line, having written nothing.
    """
    from ldm.checkpoint import read_weights

    start, plan = time.perf_counter(), plan_of(config, scheduler)
    check_target(target)
    weights = _cast(read_weights(ckpt, use_ema, wanted=_names_of(plan)), dtype)
    if "scale_factor" in weights:
        plan = plan_of(config, scheduler, float(weights["scale_factor"]))
    logger.info("%s: %d tensors", ckpt, len(weights))
    if plan.pipeline is None and plan.scheduler is not None:
        logger.info("no pipeline of diffusers holds this model: its parts are written, without a model_index.json")
    worst, files, taken = 0.0, {}, set()
    for part in plan.components:
        converted, apart = _converted(part, weights)
        files[Path(part.folder) / part.weights_name] = converted
        taken |= {part.prefix + rule.ours for rule in part.layout.rules()}
        worst = max(worst, apart)
    files |= _other_files(plan, weights, taken)
    with new_folder(target) as folder:
        for name, tensors in files.items():
            save_tensors(tensors, folder / name)
            logger.info("%s: %d tensors, %.2f GB", name, len(tensors), _gigabytes(tensors))
        for name, content in _configs(plan).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content, encoding="utf-8")
        _save_yaml(config, folder / "config.yaml")
    return Conversion(target, sum(map(len, files.values())), worst, time.perf_counter() - start)


def to_file(config: Mapping[str, Any], folder: Path, target: Path, dtype: str | None = None) -> Conversion:
    """A diffusers folder as one file of `config`, .ckpt or .safetensors, with published names; `target` must not exist.

    Raises ConversionError or CheckpointError in one line, having written nothing: also where the folder's configs are not the YAML's.
    """
    from ldm.checkpoint import write_weights

    start, plan = time.perf_counter(), plan_of(config)
    check_target(target)
    if target.suffix not in (".ckpt", ".safetensors"):
        raise ConversionError(f"--out {target}: name a file that ends in .ckpt or .safetensors")
    check_folder(folder, plan)
    kind = plan.text.kind if plan.text else None
    weights = _cast(read_folder(folder, kind, fill_unused=False), dtype)
    logger.info("%s: %d tensors", folder, len(weights))
    worst = max(_converted(part, weights)[1] for part in plan.components)
    if plan.condition_file and not any(name.startswith(plans.CONDITION) for name in weights):
        logger.warning(
            "%s: has no %s: the file is written without weights of the condition's encoder", folder, plan.condition_file
        )
    if plan.shared_condition:
        stage = {name: tensor for name, tensor in weights.items() if name.startswith(plans.STAGE)}
        weights |= {plans.CONDITION + name.removeprefix(plans.STAGE): tensor for name, tensor in stage.items()}
    if kind == text.CLIP:
        import torch

        weights[text.POSITION_IDS] = torch.arange(plan.text.positions)[None]  # published files hold it
    if plan.scheduler is not None and plan.scale_factor is None and "scale_factor" not in weights:
        import torch

        weights["scale_factor"] = torch.tensor(scale_factor_of(folder) or 1.0)
    write_weights(weights, target)
    return Conversion(target, len(weights), worst, time.perf_counter() - start)


# ------------------------------------------------------------------------------------------------------------------- weights


def _names_of(plan: Plan) -> list[str]:
    """The published names that the plan's components need, so that a file of averages alone can be read."""
    return [part.prefix + rule.ours for part in plan.components for rule in part.layout.rules()]


def _cast(weights: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """Weights in another precision; tables and single numbers of the model itself (names without a dot) stay as they are."""
    if dtype is None:
        return dict(weights)
    import torch

    to: torch.dtype = getattr(torch, DTYPES[dtype])
    return {
        name: tensor.to(to) if "." in name and tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }


def _converted(part: Component, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """A component's tensors in diffusers' names, once its parity check has passed, and how far apart the two sides were."""
    from ldm.convert.parity import check_component

    start = time.perf_counter()
    own = {name.removeprefix(part.prefix): tensor for name, tensor in weights.items() if name.startswith(part.prefix)}
    theirs = to_theirs(part.layout.rules(), own, part.name)
    parity = check_component(part, own, theirs)
    seconds = time.perf_counter() - start
    logger.info(
        "%s: %d blocks agree within %.1e of their outputs (%.1f s)", part.name, parity.blocks, parity.worst, seconds
    )
    return theirs, parity.worst


def _other_files(plan: Plan, weights: Mapping[str, Tensor], taken: set[str]) -> dict[Path, dict[str, Tensor]]:
    """What no component holds: the condition's own weights and, under their published names, what diffusers has no place for."""
    rest = {name: tensor for name, tensor in weights.items() if name not in taken}
    training = [name for name in rest if name.startswith(_TRAINING_ONLY)]
    again = [name for name in rest if plan.shared_condition and name.startswith(plans.CONDITION)]
    if training:
        logger.info("left out: %d tensors of training alone (losses, averages)", len(training))
    rest = {name: tensor for name, tensor in rest.items() if name not in (*training, *again)}
    files = {}
    if plan.condition_file is not None:
        condition = {name: tensor for name, tensor in rest.items() if name.startswith(plans.CONDITION)}
        rest = {name: tensor for name, tensor in rest.items() if name not in condition}
        if condition:
            files[Path(plan.condition_file)] = {
                name.removeprefix(plans.CONDITION): tensor for name, tensor in condition.items()
            }
    if rest and plan.scheduler is not None:
        files[Path(EXTRAS)] = rest
    return files


def _gigabytes(tensors: Mapping[str, Tensor]) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e9


# ------------------------------------------------------------------------------------------------------------------- configs


def _configs(plan: Plan) -> dict[str, str]:
    """Every file that is no weights -> its content."""
    files: dict[str, Any] = {str(Path(part.folder) / "config.json"): part.config for part in plan.components}
    if plan.scheduler is not None:
        files["scheduler/scheduler_config.json"] = plan.scheduler
    if (index := plan.model_index()) is not None:
        files["model_index.json"] = index
    files = {
        name: {**config, **({"_diffusers_version": _FORMAT} if "_class_name" in config else {})}
        for name, config in files.items()
    }
    if plan.text is not None:
        files |= {f"tokenizer/{name}": content for name, content in tokenizer_files(plan.text.kind).items()}
    return {name: content if isinstance(content, str) else as_json(content) for name, content in files.items()}


def _save_yaml(config: Mapping[str, Any], path: Path) -> None:
    """The model's own config, with which this framework loads the folder; diffusers does not look at it."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create({"model": config["model"]}), path)


def tokenizer_files(kind: str) -> dict[str, Any]:
    """The files of tokenizer/: name -> text, or what becomes JSON. kind: CLIP pads with the end token, OPEN_CLIP with id 0, "!"."""
    tokenizer = clip_tokenizer()
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END if kind == text.CLIP else "!"}
    return {
        "vocab.json": tokenizer.token_ids,
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in tokenizer.merges), ""]),
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "do_lower_case": True,
            **special,
        },
    }
