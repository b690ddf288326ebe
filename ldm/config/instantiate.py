"""Objects from configs: `instantiate_from_config` behind an allow-list of packages (`target:` and `params:`)."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from ldm.config.suggest import closest, did_you_mean

FIRST_STAGE_AS_CONDITION = "__is_first_stage__"
UNCONDITIONAL = "__is_unconditional__"

# Published targets that live elsewhere here. `main` is never imported: a stray main.py in the working directory must not run.
ALIASES = {
    "main.DataModuleFromConfig": "ldm.data.datamodule.DataModuleFromConfig",
    "main.WrappedDataset": "ldm.data.datamodule.WrappedDataset",
    "main.ImageLogger": "ldm.callbacks.ImageLogger",
    "main.SetupCallback": "ldm.callbacks.SetupCallback",
    "main.CUDACallback": "ldm.callbacks.CUDACallback",
}
MODULE_ALIASES = {
    "taming.modules.losses.vqperceptual": "ldm.modules.losses.vqperceptual",
    "taming.data.faceshq": "ldm.data.faceshq",
}

_BUILT_IN_PREFIXES = (
    "ldm",
    "torch.nn",
    "torch.optim",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.loggers",
    "pytorch_lightning.plugins",
    "pytorch_lightning.profilers",
    "pytorch_lightning.strategies",
)
_user_prefixes: list[str] = []


class ConfigError(ValueError):
    """A YAML or override that cannot be used; the message is one line that names the place, the value and the choices."""


def allow_targets(*prefixes: str) -> None:
    """Let `target:` name classes and functions under these packages too, e.g. `allow_targets("my_project")`.

    A config can never call this: what may be imported is decided in Python or on the command line.
    """
    for prefix in prefixes:
        if not all(part.isidentifier() for part in prefix.split(".")):
            raise ValueError(f"allow_targets({prefix!r}): expected a dotted package name such as 'my_project.models'")
        if prefix not in _user_prefixes:
            _user_prefixes.append(prefix)


def resolve_alias(target: str) -> str:
    """The place where a published target lives in this project; other names come back unchanged."""
    if target in ALIASES:
        return ALIASES[target]
    module, _, name = target.rpartition(".")
    return f"{MODULE_ALIASES[module]}.{name}" if module in MODULE_ALIASES else target


def check_allowed(target: Any) -> str:
    """The place that a target stands for; nothing is imported. Raises ConfigError unless it is a name under an allowed prefix."""
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")) or "." not in target:
        raise ConfigError(f"target {target!r}: expected a dotted name such as 'ldm.models.autoencoder.AutoencoderKL'")
    resolved = resolve_alias(target)
    private = any(part.startswith("_") for part in resolved.split(".")) and not _under(resolved, _user_prefixes)
    if private:
        raise ConfigError(f"target {target!r}: names that begin with an underscore are a package's own and no targets")
    if not _is_allowed(resolved):
        choices = ", ".join((*_BUILT_IN_PREFIXES, *_user_prefixes))
        near = closest(target, ALIASES, cutoff=0.6)
        hint = f" (did you mean {near}?)" if near else ""
        package = target.split(".")[0]
        way = f"For your own code run with --allow-targets {package} or call ldm.util.allow_targets({package!r})"
        if (
            package in sys.stdlib_module_names or package == "posix"
        ):  # nobody's model: this is no place to teach how to allow it
            way = "This one is Python's own: a config that names it means harm"
        raise ConfigError(f"target {target!r} is not allowed{hint}. Allowed packages: {choices}. {way}")
    return resolved


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """The class that a dotted name stands for.

    Raises ConfigError where the name is not under an allowed prefix (checked before anything is imported), does not
    exist, or turns out to be something that an allowed module merely imported.
    """
    resolved = check_allowed(string)
    module_name, name = resolved.rsplit(".", 1)
    module = _import_module(module_name, string)
    if reload:
        module = importlib.reload(module)
    if not hasattr(module, name):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value) and _is_target(value)]
        raise ConfigError(f"target {string!r}: module {module_name} has no {name!r}{did_you_mean(name, classes)}")
    obj = getattr(module, name)
    if not _is_target(obj):
        raise ConfigError(f"target {string!r} is {_home(obj) or type(obj).__name__}, not a class of an allowed package")
    return obj


def _home(obj: Any) -> str:
    return f"{getattr(obj, '__module__', '')}.{getattr(obj, '__qualname__', '')}".strip(".")


def _is_target(obj: Any) -> bool:
    """True for classes of allowed packages, and for functions of the user's own."""
    home = _home(obj)
    return _is_allowed(home) and (inspect.isclass(obj) or (_under(home, _user_prefixes) and callable(obj)))


def instantiate_from_config(config: Any, **extra: Any) -> Any:
    """The object that `{"target": ..., "params": {...}}` describes; `extra` is passed beside the params.

    `__is_first_stage__` and `__is_unconditional__` give None: the model that reads them knows what they mean.
    Raises ConfigError naming the YAML path, the target and the nearest valid name for an unknown parameter.
    """
    if isinstance(config, str) and config in (FIRST_STAGE_AS_CONDITION, UNCONDITIONAL):
        return None
    path = _yaml_path(config)
    if not isinstance(config, Mapping) or "target" not in config:
        shown = sorted(map(str, config)) if isinstance(config, Mapping) else repr(config)
        raise ConfigError(f"{path or 'config'}: expected a mapping with the key 'target', got {shown}")
    unknown = [key for key in config if key not in ("target", "params", "base_learning_rate")]
    if unknown:
        place = _at(path, unknown[0])
        raise ConfigError(
            f"{place}: unknown key beside target; arguments of {config['target']} go under {_at(path, 'params')}"
        )
    target = config["target"]
    try:
        cls = get_obj_from_str(target)
    except ConfigError as error:
        raise ConfigError(f"{_at(path, 'target')}: {error}") from error
    params = config.get("params") or {}
    if not isinstance(params, Mapping):
        raise ConfigError(f"{_at(path, 'params')}: expected a mapping of arguments of {target}, got {params!r}")
    params = {**params, **extra}
    _check_params(cls, params, target, path)
    try:
        return cls(**params)
    except Exception as error:
        error.add_note(f"while building {target}" + (f" ({path})" if path else ""))
        raise


def accepted_params(cls: Any) -> tuple[set[str], set[str]] | None:
    """(accepted, required) argument names of a class, following **kwargs up to its bases; None where it takes anything."""
    accepted: set[str] = set()
    required: set[str] = set()
    constructors = (
        [vars(c)["__init__"] for c in cls.__mro__ if "__init__" in vars(c)] if inspect.isclass(cls) else [cls]
    )
    for position, constructor in enumerate(constructors):
        try:
            parameters = list(inspect.signature(constructor).parameters.values())
        except (TypeError, ValueError):
            return None
        if inspect.isclass(cls):
            parameters = parameters[1:]  # self
        for p in parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                accepted.add(p.name)
                # A base's required argument may be supplied by the subclass itself, so only the class's own are certain.
                if p.default is p.empty and position == 0:
                    required.add(p.name)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return accepted, required
    return None


def _check_params(cls: Any, params: Mapping[str, Any], target: str, path: str) -> None:
    names = accepted_params(cls)
    if names is None:
        return
    accepted, required = names
    where = _at(path, "params")
    for key in params:
        if key not in accepted:
            raise ConfigError(f"{where}.{key}: {target} takes no such parameter{did_you_mean(key, accepted)}")
    missing = sorted(required - set(params))
    if missing:
        raise ConfigError(f"{where}: {target} needs {', '.join(missing)}")


def _import_module(module_name: str, target: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        parts = module_name.split(".")
        ours = error.name is not None and (module_name == error.name or module_name.startswith(error.name + "."))
        if not ours and error.name not in parts:
            raise ConfigError(
                f"target {target!r} needs the package {error.name!r}, which is not installed: pip install {error.name.split('.')[0]}"
            ) from error
        raise ConfigError(f"target {target!r}: there is no module {error.name or module_name}") from error


def _under(name: str, prefixes: tuple[str, ...] | list[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _is_allowed(name: str) -> bool:
    return _under(name, _BUILT_IN_PREFIXES) or _under(name, _user_prefixes)


def _yaml_path(config: Any) -> str:
    """Where a config node stands in its YAML ('model.params.unet_config'), as far as it knows its parents."""
    full_key = getattr(config, "_get_full_key", None)
    return full_key(None) if full_key is not None else ""


def _at(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
