"""One config from YAML files and dotted overrides, checked from the text of the classes it names, before any of them is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.files import load_yaml
from ldm.config.instantiate import ConfigError
from ldm.config.signature import constructor_arguments
from ldm.config.suggest import closest, did_you_mean
from ldm.config.trainer_keys import UNSUPPORTED, trainer_keys
from ldm.config.validate import check_targets, check_weights
from ldm.paths import ROOT, find_file

# The callbacks of every run; `lightning.callbacks` in a YAML is merged over them, and `NAME: null` leaves one out.
DEFAULT_CALLBACKS: dict[str, dict[str, Any]] = {
    "setup_callback": {"target": "ldm.callbacks.SetupCallback"},
    "image_logger": {
        "target": "ldm.callbacks.ImageLogger",
        "params": {"batch_frequency": 750, "max_images": 4, "clamp": True},
    },
    "learning_rate_logger": {
        "target": "pytorch_lightning.callbacks.LearningRateMonitor",
        "params": {"logging_interval": "step"},
    },
    "cuda_callback": {"target": "ldm.callbacks.CUDACallback"},
}
DEFAULT_CHECKPOINT: dict[str, Any] = {
    "target": "ldm.callbacks.CheckpointPolicy",
    "params": {"filename": "{epoch:06}", "save_last": True},
}
# Every 10,000 steps, all kept: built only where `lightning.callbacks` names it.
STEP_CHECKPOINTS = "metrics_over_trainsteps_checkpoint"
DEFAULT_STEP_CHECKPOINTS: dict[str, Any] = {
    "target": "pytorch_lightning.callbacks.ModelCheckpoint",
    "params": {
        "filename": "{epoch:06}-{step:09}",
        "save_top_k": -1,
        "every_n_train_steps": 10000,
        "save_weights_only": True,
    },
}

_TOP = ("model", "data", "lightning")
_LIGHTNING = ("trainer", "callbacks", "modelcheckpoint", "logger", "seed", "scale_lr")


def find_config(path: str | Path) -> Path:
    """The YAML at `path`, seen from the working directory or else from the project's own folder."""
    found = find_file(path)
    if found.is_file():
        return found
    raise ConfigError(f"--base {path}: there is no such file here or in {ROOT}{_nearest_file(Path(path))}")


def load(path: Path) -> DictConfig:
    """A YAML file as a config; raises ConfigError naming the file where it is not a mapping."""
    config = load_yaml(path)
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: expected a mapping with the keys {', '.join(_TOP)}, got a list")
    return config


def merge(files: Iterable[Path], overrides: Iterable[str] = ()) -> DictConfig:
    """The files, left to right, then the overrides; each override's path has to exist already, or to be a constructor's argument.

    Raises ConfigError for a misspelt path, naming the nearest one.
    """
    config = OmegaConf.create({})
    for path in files:
        part = load(path)
        _check_sections(part, str(path))
        try:
            config = OmegaConf.merge(config, part)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise ConfigError(f"{path}: does not merge with the configs before it: {_line(error)}") from error
    for override in overrides:
        config = _apply(config, override)
    return config


def check(config: DictConfig, weights: bool = True) -> None:
    """Raises ConfigError for what is missing, unknown, misspelt or forbidden in a merged config, as far as the classes' texts tell.

    weights: also for files of weights that a model is to begin with and that are not there.
    """
    _check_sections(config, "config")
    for section in ("model", "data"):
        node = config.get(section)
        if not isinstance(node, DictConfig) or "target" not in node:
            raise ConfigError(
                f"{section}: the configs name none; add a YAML with {section}.target and {section}.params to --base"
            )
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"config: {_line(error)}") from error
    check_targets(plain)
    if weights:
        check_weights(plain)


def _check_sections(config: DictConfig, where: str) -> None:
    _check_keys(config, (*_TOP, "safety"), where, "")  # the last is a word for the scripts that draw
    lightning = config.get("lightning")
    if lightning is None:
        return
    if not isinstance(lightning, DictConfig):
        raise ConfigError(
            f"{where}: lightning: expected a mapping with the keys {', '.join(_LIGHTNING)}, got {lightning!r}"
        )
    _check_keys(lightning, _LIGHTNING, where, "lightning.")
    trainer = lightning.get("trainer") or {}
    if not isinstance(trainer, Mapping):
        raise ConfigError(f"{where}: lightning.trainer: expected a mapping of Trainer settings, got {trainer!r}")
    for key in trainer:
        if key in UNSUPPORTED:
            raise ConfigError(f"{where}: lightning.trainer.{key}: {UNSUPPORTED[key]}")
    _check_keys(trainer, trainer_keys(), where, "lightning.trainer.")


def _check_keys(config: Mapping, known: Iterable[str], where: str, prefix: str) -> None:
    known = sorted(known) if isinstance(known, set) else list(known)
    for key in config:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {prefix}{key}{did_you_mean(str(key), known)}")


def _apply(config: DictConfig, override: str) -> DictConfig:
    path, _, value = override.partition("=")
    adds = path.startswith("+")
    path = path.removeprefix("+")
    keys = path.split(".")
    _check_lists(config, keys, override)
    if not adds:
        _check_path(config, keys, path)
    try:
        return OmegaConf.merge(config, OmegaConf.from_dotlist([f"{path}={value}"]))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{override}: cannot be applied: {_line(error)}") from error


def _check_path(config: DictConfig, keys: list[str], path: str) -> None:
    node: Any = OmegaConf.merge(_schema(), config)
    parent: Any = None
    for depth, key in enumerate(keys):
        above = ".".join(keys[:depth])
        if not isinstance(node, DictConfig):
            raise ConfigError(f"{path}: {above} is {node!r}, not a mapping")
        if key in node:
            parent, node = node, node[key] if not OmegaConf.is_missing(node, key) else None
            continue
        if key == "params" and "target" in node:
            parent, node = node, OmegaConf.create({})
            continue
        allowed = _new_keys(above, node, parent)
        if allowed is None or key in allowed:
            return
        choices = [str(name) for name in node] + sorted(allowed)
        near = closest(key, choices)
        hint = (
            f"did you mean {'.'.join([*keys[:depth], near, *keys[depth + 1 :]])}?"
            if near
            else f"choices: {', '.join(choices)}"
        )
        if depth == 0:
            raise ConfigError(f"{path}: there is no {key}; {hint} (the sections are {', '.join(_TOP)})")
        new = f" (if it is new on purpose: +{path}=...)" if _may_be_new(above, node, parent) else ""
        raise ConfigError(f"{path}: {above} has no {key}; {hint}{new}")


def _check_lists(config: DictConfig, keys: list[str], override: str) -> None:
    """Refuse an override of a part of a list, which would put a mapping in the list's place."""
    for depth in range(1, len(keys)):
        above = ".".join(keys[:depth])
        items = OmegaConf.select(config, above, throw_on_resolution_failure=False, throw_on_missing=False)
        if not isinstance(items, ListConfig):
            continue
        shown = list(items)
        if depth == len(keys) - 1 and keys[depth].isdigit() and int(keys[depth]) < len(shown):
            shown[int(keys[depth])] = override.partition("=")[2]
        whole = (
            f"{above}=[{','.join(map(str, shown))}]"
            if not any(isinstance(item, DictConfig | ListConfig) for item in items)
            else ""
        )
        raise ConfigError(f"{override}: {above} is a list; give the whole list{whole and ': '}{whole}")


def _schema() -> DictConfig:
    """What an override may name although no YAML does: the defaults that this package puts under `lightning`."""
    lightning = {"trainer": {}, "callbacks": DEFAULT_CALLBACKS, "modelcheckpoint": DEFAULT_CHECKPOINT, "logger": {}}
    lightning |= {"seed": None, "scale_lr": None}
    return OmegaConf.create({"model": {"base_learning_rate": None}, "lightning": lightning})


def _new_keys(above: str, node: DictConfig, parent: Any) -> set[str] | None:
    """Keys that may be new in the mapping `node`, which stands at the path `above`; None where anything may be."""
    if above == "lightning.trainer":
        return trainer_keys()
    if above == "lightning.callbacks":
        return {STEP_CHECKPOINTS}
    if above == "lightning.logger" and "target" not in node:
        return None
    if above.endswith(".params") and isinstance(parent, DictConfig) and "target" in parent:
        arguments = constructor_arguments(str(parent["target"]))
        return None if arguments is None else set(arguments)
    return set()


def _may_be_new(above: str, node: DictConfig, parent: Any) -> bool:
    """Whether a key that nobody knows may be meant in the mapping `node`, which stands at `above`: it is no section and no class's."""
    of_class = "target" in node or (above.endswith(".params") and isinstance(parent, DictConfig) and "target" in parent)
    return above == "lightning.callbacks" or (".params." in above and not of_class)


def _line(error: Exception) -> str:
    return ", ".join(str(error).strip().split("\n")[:2])


def _nearest_file(path: Path) -> str:
    folders = [folder for folder in (path.parent, ROOT / path.parent) if folder.is_dir()]
    names = [str(path.parent / file.name) for folder in folders for file in sorted(folder.glob("*.y*ml"))]
    near = closest(str(path), names, cutoff=0.6)
    return f"; did you mean {near}?" if near else ""
