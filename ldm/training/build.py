"""The Trainer with its loggers and callbacks, from a merged config."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.config.instantiate import ConfigError, accepted_params, get_obj_from_str, instantiate_from_config
from ldm.config.merge import DEFAULT_CALLBACKS, DEFAULT_CHECKPOINT, DEFAULT_STEP_CHECKPOINTS, STEP_CHECKPOINTS
from ldm.training.devices import Devices
from ldm.training.folder import RunFolder
from ldm.training.settings import MANUAL, LearningRate, Settings

logger = logging.getLogger(__name__)


def build_trainer(
    config: DictConfig, settings: Settings, devices: Devices, folder: RunFolder, model: Any, rate: LearningRate | None
) -> Any:
    """A Trainer for `model`; for a module with manual optimization, accumulation and clipping move from the Trainer to the module."""
    import pytorch_lightning as pl
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from ldm.checkpoint.resume import AtomicCheckpointIO

    arguments = dict(settings.trainer)
    if not model.automatic_optimization:
        _move_to_module(arguments, model)
    if devices.count * int(arguments.get("num_nodes", 1)) > 1:
        # Of a GAN's two networks each step leaves one out.
        arguments.setdefault("strategy", "ddp" if model.automatic_optimization else "ddp_find_unused_parameters_true")
    saves = arguments.setdefault("enable_checkpointing", True)
    loggers = _loggers(settings.lightning, folder) if arguments.pop("logger", True) not in (False, None) else []
    arguments.setdefault("enable_model_summary", False)
    arguments.setdefault(
        "inference_mode", False
    )  # tensors that a module keeps from validation must stay usable in training
    callbacks = _callbacks(config, settings, folder, model, rate, bool(saves), bool(loggers), arguments)
    try:
        return pl.Trainer(
            accelerator=devices.accelerator,
            devices=devices.devices,
            logger=loggers or False,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=str(folder.path),
            **arguments,
        )
    except (MisconfigurationException, TypeError) as error:
        raise ConfigError(f"Trainer: {' '.join(str(error).split())}") from error


def _move_to_module(arguments: dict[str, Any], model: Any) -> None:
    for name in MANUAL:
        value = arguments.pop(name, None)
        if value is None:
            continue
        if not hasattr(model, name):
            neutral = {"accumulate_grad_batches": 1, "gradient_clip_algorithm": "norm"}
            if value == neutral.get(name):
                continue
            raise ConfigError(
                f"--{name} {value}: {type(model).__name__} steps its optimizers itself and has no {name}; leave it out"
            )
        setattr(model, name, value)


def _loggers(lightning: DictConfig, folder: RunFolder) -> list[Any]:
    """TensorBoard where it is installed, or what `lightning.logger` names; always CSV, a file for each start of a run."""
    from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

    own = lightning.get("logger")
    loggers: list[Any] = []
    if own:
        places = {"save_dir": str(folder.path), "name": "logger"}
        cls = get_obj_from_str(own["target"])
        if not issubclass(cls, Logger):
            raise ConfigError(f"lightning.logger.target: {own['target']} is no Lightning logger")
        names = accepted_params(cls)
        given = own.get("params") or {}
        loggers.append(
            instantiate_from_config(
                own, **{k: v for k, v in places.items() if k not in given and (names is None or k in names[0])}
            )
        )
    elif importlib.util.find_spec("tensorboard") is not None:
        loggers.append(
            TensorBoardLogger(save_dir=str(folder.path), name="tensorboard", version="", default_hp_metric=False)
        )
    loggers.append(CSVLogger(save_dir=str(folder.path), name="csv", version=folder.now))
    return loggers


def _callbacks(
    config: DictConfig,
    settings: Settings,
    folder: RunFolder,
    model: Any,
    rate: LearningRate | None,
    saves: bool,
    logs: bool,
    arguments: dict[str, Any],
) -> list[Any]:
    from pytorch_lightning.callbacks import Callback, Checkpoint, LearningRateMonitor

    from ldm.callbacks import (
        CrashCheckpoint,
        ExactResume,
        ProgressBar,
        RunReport,
        SignalCallback,
        StepSeed,
        StopOnNonFinite,
    )

    nodes = callback_nodes(settings.lightning, folder, getattr(model, "monitor", None), saves)
    project = OmegaConf.create({key: value for key, value in config.items() if key != "lightning"})
    about_run = {
        "resume": str(folder.checkpoint) if folder.resumed else None,
        "now": folder.now,
        "logdir": str(folder.path),
        "ckptdir": str(folder.checkpoints),
        "cfgdir": str(folder.configs),
        "config": project,
        "lightning_config": settings.lightning,
    }
    callbacks: list[Any] = [StepSeed(settings.seed), ExactResume(), StopOnNonFinite()]
    if arguments.get("enable_progress_bar", True) not in (False, None):
        callbacks.append(ProgressBar())
    callbacks.append(RunReport(rate.value, rate.rule) if rate else RunReport())
    for name, node in nodes.items():
        cls = get_obj_from_str(node["target"])
        if not (inspect.isclass(cls) and issubclass(cls, Callback)):
            raise ConfigError(f"lightning.callbacks.{name}.target: {node['target']} is no Lightning callback")
        if issubclass(cls, Checkpoint):
            _check_filename(f"lightning.callbacks.{name}.params.filename", (node.get("params") or {}).get("filename"))
        if issubclass(cls, LearningRateMonitor) and not logs:
            continue
        if name == "setup_callback":
            callbacks.append(cls(**{**about_run, **(node.get("params") or {})}))
        else:
            callbacks.append(instantiate_from_config(node))
    # After the pictures and before Lightning's checkpoints, which it puts last: a save that a signal asks for ends the step.
    callbacks.append(SignalCallback(folder.checkpoints / "last.ckpt" if saves else None))
    if saves:
        callbacks.append(CrashCheckpoint(folder.checkpoints / "crash.ckpt"))
    return callbacks


def _check_filename(place: str, filename: str | None) -> None:
    """Raises ConfigError for a checkpoint's name that would lead out of the folder to which Lightning joins it, as `{../figure}` does."""
    if filename is None:
        return
    parts = Path(re.sub("[{}]", "", str(filename))).parts
    if (
        not parts
        or ".." in parts
        or parts[0] in ("/", "~")
        or "\0" in str(filename)
        or len(os.fsencode(str(filename))) > 200
    ):
        raise ConfigError(
            f"{place}: {str(filename)[:60]!r} is no name of a file below the folder of the checkpoints, in up to 200 bytes"
        )


def callback_nodes(lightning: DictConfig, folder: RunFolder, monitor: str | None, saves: bool) -> dict[str, DictConfig]:
    """The callbacks of a run as configs: the defaults under `lightning.callbacks` and `lightning.modelcheckpoint`; null leaves one out.

    monitor: the figure whose best three checkpoints are kept, from the model.
    """
    own = lightning.get("callbacks") or OmegaConf.create({})
    defaults = OmegaConf.create(DEFAULT_CALLBACKS)
    if own.get(STEP_CHECKPOINTS) is not None:
        defaults[STEP_CHECKPOINTS] = OmegaConf.create(DEFAULT_STEP_CHECKPOINTS)
        defaults[STEP_CHECKPOINTS].params.dirpath = str(folder.checkpoints / "trainstep_checkpoints")
    root = OmegaConf.create(
        {"lightning": {"callbacks": OmegaConf.merge(defaults, own), "modelcheckpoint": DEFAULT_CHECKPOINT}}
    )
    best = {"monitor": monitor, "save_top_k": 3} if monitor else {}
    root.lightning.modelcheckpoint.params = {
        "dirpath": str(folder.checkpoints),
        **root.lightning.modelcheckpoint.params,
        **best,
    }
    root.lightning.modelcheckpoint = OmegaConf.merge(
        root.lightning.modelcheckpoint, lightning.get("modelcheckpoint") or {}
    )
    nodes = {name: node for name, node in root.lightning.callbacks.items() if node is not None}
    for name, node in nodes.items():
        if not isinstance(node, DictConfig) or "target" not in node:
            raise ConfigError(
                f"lightning.callbacks.{name}: expected a mapping with target and params, or null to leave it out"
            )
    if saves:
        nodes["checkpoint_callback"] = root.lightning.modelcheckpoint
    return {name: node for name, node in nodes.items() if saves or "Checkpoint" not in str(node["target"])}
