"""Merge YAML files and dotted overrides into one config; the paths of overrides are checked."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.files import load_yaml
from ldm.config.instantiate import ConfigError, join_path, resolve_alias
from ldm.config.signature import constructor_arguments
from ldm.config.suggest import closest, did_you_mean
from ldm.config.trainer_keys import trainer_keys
from ldm.config.types import arguments_of, shown
from ldm.config.validate import SECTIONS, check_sections, convert_types, error_line
from ldm.paths import ROOT, find_file

logger = logging.getLogger(__name__)

# Callbacks of every run; a YAML's `lightning.callbacks` is merged over them, and `NAME: null` removes one.
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
# Weights of every 10,000th step, all kept; used only if `lightning.callbacks` names it.
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


def find_config(path: str | Path) -> Path:
    """Return the YAML at `path`, relative to the working directory or else to the checkout."""
    found = find_file(path)
    if found.is_file():
        return found
    folder = Path(path).parent
    siblings = {folder / file.name for each in (folder, ROOT / folder) for file in each.glob("*.y*ml")}
    near = closest(str(path), map(str, siblings), cutoff=0.6)
    raise ConfigError(f"--base {path}: no such file here or in {ROOT}{f'; did you mean {near}?' if near else ''}")


def merge(files: Iterable[Path], overrides: Iterable[str] = (), onto: DictConfig | None = None) -> DictConfig:
    """Merge files, left to right, then overrides; `onto` comes before the files.

    Raises ConfigError for a file that is not a mapping of known sections, and, with the nearest path, for an override
    whose path neither exists nor is a constructor argument.
    """
    config = OmegaConf.create({}) if onto is None else onto
    changed: dict[str, _OldClass] = {}
    for path in files:
        part = load_yaml(path)
        if not isinstance(part, DictConfig):
            raise ConfigError(f"{path}: expected a mapping with the keys {', '.join(SECTIONS)}, got a list")
        check_sections(part, str(path))
        try:
            config = _merge(config, part, changed)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise ConfigError(f"{path}: cannot be merged with the configs before it: {error_line(error)}") from error
    for override in overrides:
        config = _apply(config, override, changed)
    _check_changed_targets(config, changed)
    convert_types(config)
    return config


def read_model(files: list[Path], overrides: list[str]) -> DictConfig:
    """Return the section `model` of merged files, interpolations resolved, and the key `safety` if present.

    Raises ValueError (or FileNotFoundError) in one line.
    """
    path = files[-1]
    for override in overrides:
        if not override.lstrip("+~").startswith("model."):
            raise ValueError(f"{override}: only model. paths can be overridden here, e.g. model.params.use_ema=false")
    if not path.is_file():
        raise FileNotFoundError(
            f"config {path}: no such file; give --config FILE.yaml (of your own run: its configs/*-project.yaml)"
        )
    try:
        config: Any = merge(files, overrides) if len(files) > 1 or overrides else load_yaml(path)
        model = config.get("model") if isinstance(config, DictConfig) else None
        if not isinstance(config, DictConfig) or not isinstance(model, DictConfig) or "target" not in model:
            raise ValueError(
                f"config {path}: no section 'model' with a 'target'; is it the YAML of the model's training?"
            )
        kept: dict[str, Any] = {"model": OmegaConf.to_container(model, resolve=True)}  # other sections may not resolve
        kept_config = OmegaConf.create(kept | ({"safety": config["safety"]} if "safety" in config else {}))
        convert_types(kept_config)
        return kept_config
    except (OmegaConfBaseException, OSError) as error:
        raise ValueError(f"config {path}: cannot be read: {error_line(error)}") from error


class _OldClass(NamedTuple):
    target: str
    params: set[str]  # those that the YAML with the new target keeps without naming them


def _merge(base: DictConfig, part: DictConfig, changed: dict[str, _OldClass]) -> DictConfig:
    """Merge `part` over `base`; `~key` deletes a key and `_replace_: true` the mapping of `base`.

    `_replace_: {...}` replaces a mapping too, and logs how it differs from the one in the braces.
    changed: receives the former class at the path of each node whose target changes.
    """
    below: Any = OmegaConf.to_container(base, resolve=False)
    above: Any = OmegaConf.to_container(part, resolve=False)
    _take_out(below, above, "", changed)
    merged = OmegaConf.merge(OmegaConf.create(below), OmegaConf.create(above))
    assert isinstance(merged, DictConfig)
    return merged


def _take_out(below: dict[Any, Any], above: dict[Any, Any], path: str, changed: dict[str, _OldClass]) -> None:
    """Delete from `below` what the marks in `above` ask for, and the marks."""
    if (replace := above.pop("_replace_", False)) is not False:
        if isinstance(replace, dict):
            _warn_of_changes(path, replace, below, above)
        elif replace is not True:
            raise ConfigError(f"{join_path(path, '_replace_')} {shown(replace)}: expected true or false")
        below.clear()
    for key in [key for key in above if str(key).startswith("~")]:
        name = str(key)[1:]
        if name not in below:
            raise ConfigError(f"~{join_path(path, name)}: no such key to delete{did_you_mean(name, below)}")
        if above.pop(key) is not None:
            raise ConfigError(f"{join_path(path, str(key))}: a key that is deleted takes no value")
        del below[name]
    old = below.get("target")
    for key, value in above.items():
        if isinstance(value, dict):
            inner = below.get(key)
            _take_out(inner if isinstance(inner, dict) else {}, value, join_path(path, str(key)), changed)
    if (
        isinstance(old, str)
        and isinstance(new := above.get("target"), str)
        and resolve_alias(new) != resolve_alias(old)
    ):
        inherited = set(below.get("params") or ()) - set(above.get("params") or ())
        changed.setdefault(path, _OldClass(old, inherited))


def _warn_of_changes(path: str, expected: dict[Any, Any], found: dict[Any, Any], above: dict[Any, Any]) -> None:
    """Log how `found`, which `above` replaces, differs from `expected`, which `above` was made from."""
    if found and found.get("target") != above.get("target"):
        for name, old, new in changes(expected, found):
            text = "%-11s %s: is %s, but what replaces it was made with %s"
            logger.warning(text, "config", join_path(path, name), new, old)


def changes(before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (path, value in `before`, value in `after`) of each value that differs; "default" stands for none."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    for name in sorted(old.keys() | new.keys()):
        values = old.get(name, "default"), new.get(name, "default")
        if values[0] != values[1]:
            yield name, *values


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif node != {}:
        yield path, node


def _check_changed_targets(config: DictConfig, changed: Mapping[str, _OldClass]) -> None:
    """Raise ConfigError if a class inherits parameters that it does not take from the class that it replaces."""
    for path, old in changed.items():
        node = OmegaConf.select(config, path, throw_on_resolution_failure=False)
        arguments = constructor_arguments(str(node["target"])) if isinstance(node, DictConfig) else None
        unknown = sorted(old.params & set(node.get("params") or ()) - set(arguments)) if arguments is not None else []
        if unknown:
            raise ConfigError(
                f"{path}.params: {node['target']} takes no {', '.join(unknown)}, set for {old.target} before; drop "
                f"them by params: {{_replace_: true, ...}} in the YAML or ~{path}.params on the command line"
            )


def _apply(config: DictConfig, override: str, changed: dict[str, _OldClass]) -> DictConfig:
    if override.startswith("~"):
        keys = override[1:].split(".")
        deletion: dict[str, Any] = {f"~{keys[-1]}": None}
        for key in reversed(keys[:-1]):
            deletion = {key: deletion}
        return _merge(config, OmegaConf.create(deletion), changed)
    path, _, value = override.partition("=")
    adds, path = path.startswith("+"), path.removeprefix("+")
    keys = path.split(".")
    _check_lists(config, keys, override)
    if not adds:
        _check_path(config, keys)
    try:
        part = OmegaConf.from_dotlist([f"{path}={value}"])
        merged = _merge(config, part, changed)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{override}: cannot be applied: {error_line(error)}") from error
    if adds:
        check_sections(part, override)
    return merged


def _check_path(config: DictConfig, keys: list[str]) -> None:
    """Raise ConfigError unless every key of an override's path exists or is an argument of the class there."""
    path = ".".join(keys)
    node: Any = OmegaConf.merge(_schema(), config)
    parent: Any = None
    section: set[str] = set()  # keys that the class around `node` reads in it
    for depth, key in enumerate(keys):
        above = ".".join(keys[:depth])
        if not isinstance(node, DictConfig):
            raise ConfigError(f"{path}: {above} is {node!r}, not a mapping")
        if key in node:
            section = _section_keys(parent, key) if above.endswith(".params") else set()
            parent, node = node, node[key] if not OmegaConf.is_missing(node, key) else None
            continue
        if key == "params" and "target" in node:
            parent, node = node, OmegaConf.create({})
            continue
        allowed, is_open = (section, False) if section else _new_keys(above, node, parent)
        if allowed is None or key in allowed:
            return
        choices = list(dict.fromkeys([*map(str, node), *sorted(allowed)]))
        near = closest(key, choices)
        meant = ".".join([*keys[:depth], near, *keys[depth + 1 :]]) if near else ""
        hint = f"did you mean {meant}?" if near else f"choices: {', '.join(choices)}"
        if depth == 0:
            raise ConfigError(f"{path}: unknown section {key}; {hint} (the sections are {', '.join(SECTIONS)})")
        new = f" (to add a new key: +{path}=...)" if is_open else ""
        raise ConfigError(f"{path}: {above} has no {key}; {hint}{new}")


def _check_lists(config: DictConfig, keys: list[str], override: str) -> None:
    """Raise ConfigError for an override of a list's item: it would put a mapping in the list's place."""
    for depth in range(1, len(keys)):
        above = ".".join(keys[:depth])
        items = OmegaConf.select(config, above, throw_on_resolution_failure=False, throw_on_missing=False)
        if not isinstance(items, ListConfig):
            continue
        shown = list(items)
        if depth == len(keys) - 1 and keys[depth].isdigit() and int(keys[depth]) < len(shown):
            shown[int(keys[depth])] = override.partition("=")[2]
        nested = any(isinstance(item, DictConfig | ListConfig) for item in items)
        whole = "" if nested else f": {above}=[{','.join(map(str, shown))}]"
        raise ConfigError(f"{override}: {above} is a list; give the whole list{whole}")


def _schema() -> DictConfig:
    """Paths that an override may name although no YAML does."""
    lightning: dict[str, Any] = dict.fromkeys(("seed", "scale_lr", "compile"))
    lightning |= {"trainer": {}, "logger": {}, "callbacks": DEFAULT_CALLBACKS, "modelcheckpoint": DEFAULT_CHECKPOINT}
    return OmegaConf.create({"model": {"base_learning_rate": None}, "lightning": lightning})


def _section_keys(parent: Any, key: str) -> set[str]:
    """Return the keys of a mapping that is the argument `key` of the class at the node `parent`, if they are known."""
    target = parent.get("target") if isinstance(parent, DictConfig) else None
    inner = arguments_of((constructor_arguments(str(target)) or {}).get(key, ""))
    return set((constructor_arguments(inner) if inner else None) or ())


def _new_keys(above: str, node: DictConfig, parent: Any) -> tuple[set[str] | None, bool]:
    """Return the keys that may be new in the mapping `node` at the path `above`, and whether `+` may add any other.

    None stands for any key.
    """
    if above == "lightning.trainer":
        return trainer_keys(), False
    if above == "lightning.callbacks":
        return {STEP_CHECKPOINTS}, True
    if above == "lightning.logger" and "target" not in node:
        return None, True
    if above.endswith(".params") and isinstance(parent, DictConfig) and "target" in parent:
        arguments = constructor_arguments(str(parent["target"]))
        return (None if arguments is None else set(arguments)), False
    return set(), ".params." in above and "target" not in node
