"""The Trainer with its loggers and callbacks, from a merged config."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, Checkpoint, LearningRateMonitor
from pytorch_lightning.callbacks import ProgressBar as LightningBar
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.callbacks import (
    CompileTime,
    CrashCheckpoint,
    DataCheck,
    EMASnapshots,
    ExactResume,
    ProgressBar,
    RunReport,
    SignalCallback,
    StepSeed,
    StopOnNonFinite,
)
from ldm.checkpoint.snapshots import SNAPSHOTS
from ldm.cli import one_line
from ldm.config.instantiate import ConfigError, accepted_params, get_obj_from_str, instantiate_from_config
from ldm.config.merge import DEFAULT_CALLBACKS, DEFAULT_CHECKPOINT, DEFAULT_STEP_CHECKPOINTS, STEP_CHECKPOINTS
from ldm.modules.ema import EMAConfig
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.devices import Devices
from ldm.training.loggers import MetricsFile, log_without_copies, never_fail
from ldm.training.run_directory import RunDirectory
from ldm.training.settings import LearningRate, RunSettings
from ldm.training.strategies import make_strategy

logger = logging.getLogger(__name__)

# Settings that a module with manual optimization applies itself, with their neutral values.
_MANUAL = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "gradient_clip_algorithm": "norm"}


def default_strategy(model: pl.LightningModule) -> str:
    """Return the strategy for several devices: each step of a GAN uses only one of its networks."""
    one_network = getattr(getattr(model, "loss", None), "discriminator", model) is None  # a first stage without a GAN
    return "ddp" if model.automatic_optimization or one_network else "ddp_find_unused_parameters_true"


def build_trainer(
    config: DictConfig,
    settings: RunSettings,
    devices: Devices,
    directory: RunDirectory,
    model: pl.LightningModule,
    rate: LearningRate | None,
) -> pl.Trainer:
    """Build the Trainer for `model`; accumulation and clipping go to the module if it uses manual optimization."""
    arguments = dict(settings.trainer)
    automatic = model.automatic_optimization
    if not automatic:
        _move_to_module(arguments, model)
    if devices.processes * settings.num_nodes > 1:
        arguments.setdefault("strategy", default_strategy(model))
    arguments.setdefault("enable_checkpointing", True)
    arguments.setdefault("enable_model_summary", False)
    # Inference tensors that a module keeps from validation would not be usable in training.
    arguments.setdefault("inference_mode", False)
    log_without_copies()
    loggers = _loggers(settings.lightning, directory) if arguments.pop("logger", True) not in (False, None) else []

    saves = bool(arguments["enable_checkpointing"])
    callbacks: list[Callback] = [DataCheck(), StepSeed(settings.seed), ExactResume(), StopOnNonFinite()]
    configured = _configured_callbacks(config, settings, directory, model, saves, bool(loggers), devices.accelerator)
    own_bar = any(isinstance(callback, LightningBar) for callback in configured)
    if arguments.pop("enable_progress_bar", True) not in (False, None) and not own_bar:
        callbacks.append(ProgressBar())
    callbacks.append(RunReport(rate.rule if rate else ""))
    if settings.compile is not None:
        callbacks.append(CompileTime(settings.compile))
    ema: EMAConfig | None = getattr(model, "ema_config", None)
    if saves and ema is not None and ema.snapshot_every:
        callbacks.append(EMASnapshots(directory.path / SNAPSHOTS, ema.snapshot_every, ema.snapshots))
    callbacks += configured
    # After the image logs and before Lightning's checkpoints, which come last: a signal's save ends the step.
    callbacks.append(SignalCallback(directory.checkpoints / "last.ckpt" if saves else None))
    if saves:
        callbacks.append(CrashCheckpoint(directory.checkpoints / "crash.ckpt"))
    return _trainer(
        devices,
        logger=loggers or False,
        callbacks=callbacks,
        enable_progress_bar=own_bar,  # ours spans the whole run
        # DeepSpeed writes its own checkpoints and refuses the plugin.
        plugins=[] if str(arguments.get("strategy")).startswith("deepspeed") else [AtomicCheckpointIO()],
        default_root_dir=str(directory.path),
        **arguments,
    )


def check_trainer(settings: RunSettings, devices: Devices) -> None:
    """Raise ConfigError for settings that the Trainer refuses, before data and model are built."""
    if settings.trainer.get("profiler") == "xla" and importlib.util.find_spec("torch_xla") is None:
        raise ConfigError(
            "lightning.trainer.profiler xla: torch_xla is not installed; choose simple, advanced or pytorch"
        )
    _trainer(devices, **{"enable_checkpointing": True, **settings.trainer, "logger": False})


def _trainer(devices: Devices, **arguments: Any) -> pl.Trainer:
    arguments["strategy"] = make_strategy(str(arguments.get("strategy", "auto")))
    try:
        return pl.Trainer(accelerator=devices.accelerator, devices=devices.devices, **arguments)
    except (MisconfigurationException, TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"lightning.trainer: {one_line(error)}") from error


def _move_to_module(arguments: dict[str, Any], model: pl.LightningModule) -> None:
    for name, neutral in _MANUAL.items():
        value = arguments.pop(name, None)
        if value is None:
            continue
        if hasattr(model, name):
            setattr(model, name, value)
        elif value != neutral:
            raise ConfigError(
                f"--{name} {value}: {type(model).__name__} uses manual optimization and does not support it; remove it"
            )


def _loggers(lightning: DictConfig, directory: RunDirectory) -> list[Logger]:
    """Build `lightning.logger`, or else TensorBoard's if installed, and csv/metrics.csv; their errors end no run."""
    node, folder = lightning.get("logger"), str(directory.path)
    csv = MetricsFile(directory.path / "csv" / "metrics.csv")
    if node:
        cls = get_obj_from_str(node["target"])
        if not issubclass(cls, Logger):
            raise ConfigError(f"lightning.logger.target: {node['target']} is not a Lightning logger")
        names, given = accepted_params(cls), node.get("params") or {}
        places = {"save_dir": folder, "name": "logger"}
        places = {key: place for key, place in places.items() if key not in given and (not names or key in names[0])}
        boards: list[Logger] = [instantiate_from_config(node, **places)]
    elif importlib.util.find_spec("tensorboard") is None:
        boards = []
    else:
        boards = [TensorBoardLogger(save_dir=folder, name="tensorboard", version="", default_hp_metric=False)]
    return [never_fail(board) for board in (*boards, csv)]


def _configured_callbacks(
    config: DictConfig,
    settings: RunSettings,
    directory: RunDirectory,
    model: pl.LightningModule,
    saves: bool,
    logs: bool,
    accelerator: str,
) -> list[Callback]:
    """Build the default callbacks with `lightning.callbacks` and `modelcheckpoint` merged over them.

    null removes a callback. Without `saves` no checkpoint callbacks are built, without `logs` no LearningRateMonitor.
    """
    lightning = settings.lightning
    own = lightning.get("callbacks") or OmegaConf.create({})
    defaults, checkpoint = OmegaConf.create(DEFAULT_CALLBACKS), OmegaConf.create(DEFAULT_CHECKPOINT)
    if own.get(STEP_CHECKPOINTS) is not None:
        defaults[STEP_CHECKPOINTS] = OmegaConf.create(DEFAULT_STEP_CHECKPOINTS)
        defaults[STEP_CHECKPOINTS].params.dirpath = str(directory.checkpoints / "trainstep_checkpoints")
    checkpoint.params.dirpath = str(directory.checkpoints)
    if monitor := getattr(model, "monitor", None):
        checkpoint.params.update(monitor=monitor, save_top_k=3)  # the best three by this metric
    merged: dict[str, Any] = {
        "callbacks": OmegaConf.merge(defaults, own),
        "modelcheckpoint": OmegaConf.merge(checkpoint, lightning.get("modelcheckpoint") or {}),
    }
    images = merged["callbacks"].get("image_logger")
    given = (own.get("image_logger") or {}).get("params") or {}
    if accelerator == "cpu" and images and not {"early_factor", "increase_log_steps", "log_images_kwargs"} & set(given):
        quick = dict(getattr(model, "quick_images", {}))
        images.params.update(early_factor=4, log_images_kwargs=quick)
        chosen = ", ".join(f"{key} {value}" for key, value in quick.items())
        text = f"on the CPU early logs are at steps 1, 4, 16, ...{f', with {chosen}' if chosen else ''}"
        logger.info("%-11s %s (lightning.callbacks.image_logger.params changes it)", "images", text)
    tree = OmegaConf.create({"lightning": merged}).lightning  # so that a node knows its path for error messages
    nodes = {f"lightning.callbacks.{name}": node for name, node in tree.callbacks.items() if node is not None}
    if saves:
        nodes["lightning.modelcheckpoint"] = tree.modelcheckpoint

    callbacks: list[Callback] = []
    for place, node in nodes.items():
        if not isinstance(node, DictConfig) or "target" not in node:
            raise ConfigError(f"{place}: expected a mapping with target and params, or null to remove it")
        if "Checkpoint" in str(node["target"]) and not saves:
            continue
        cls, params = get_obj_from_str(node["target"]), node.get("params") or {}
        if not (inspect.isclass(cls) and issubclass(cls, Callback)):
            raise ConfigError(f"{place}.target: {node['target']} is not a Lightning callback")
        if issubclass(cls, Checkpoint):
            _check_filename(f"{place}.params.filename", params.get("filename"))
        if place == "lightning.callbacks.setup_callback":
            about_run = {
                "resume": str(directory.path) if directory.resumed else None,
                "now": directory.now,
                "logdir": str(directory.path),
                "ckptdir": str(directory.checkpoints),
                "cfgdir": str(directory.configs),
                "config": OmegaConf.create({key: value for key, value in config.items() if key != "lightning"}),
                "lightning_config": lightning,
            }
            callbacks.append(cls(**{**about_run, **params}))
        elif logs or not issubclass(cls, LearningRateMonitor):
            callbacks.append(instantiate_from_config(node))
    return callbacks


def _check_filename(place: str, filename: str | None) -> None:
    """Raise ConfigError for a checkpoint name that would lead out of its folder, as `{../metric}` does."""
    if filename is None:
        return
    name = str(filename)
    parts = Path(re.sub("[{}]", "", name)).parts
    if not parts or ".." in parts or parts[0] in ("/", "~") or "\0" in name or len(os.fsencode(name)) > 200:
        raise ConfigError(
            f"{place}: {name[:60]!r} is not the name of a file inside the checkpoint folder, of at most 200 bytes"
        )
