"""`instantiate_from_config`: build objects from `target:` and `params:`, behind an allow-list of packages."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ldm.atomic import is_out_of_memory
from ldm.config.suggest import closest, did_you_mean, log_unused
from ldm.config.types import convert, or_none, shown

Built = TypeVar("Built")

FIRST_STAGE_AS_CONDITION = "__is_first_stage__"
UNCONDITIONAL = "__is_unconditional__"

# Published targets that live elsewhere. `main` is never imported: a main.py in the working directory must not run.
ALIASES = {
    "main.DataModuleFromConfig": "ldm.data.datamodule.DataModuleFromConfig",
    "main.WrappedDataset": "ldm.data.datamodule.WrappedDataset",
    "edit_dataset.EditDataset": "ldm.data.edits.EditDataset",
    "main.ImageLogger": "ldm.callbacks.ImageLogger",
    "main.SetupCallback": "ldm.callbacks.SetupCallback",
    "main.CUDACallback": "ldm.callbacks.CUDACallback",
    "ldm.models.diffusion.ddpm.LatentFinetuneDiffusion": "ldm.models.diffusion.variants.LatentFinetuneDiffusion",
    "ldm.models.diffusion.ddpm.LatentInpaintDiffusion": "ldm.models.diffusion.variants.LatentInpaintDiffusion",
    "ldm.models.diffusion.ddpm.LatentDepth2ImageDiffusion": "ldm.models.diffusion.variants.LatentDepth2ImageDiffusion",
    "ldm.models.diffusion.ddpm.LatentUpscaleFinetuneDiffusion": (
        "ldm.models.diffusion.variants.LatentUpscaleFinetuneDiffusion"
    ),
    "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion": "ldm.models.diffusion.variants.LatentUpscaleDiffusion",
    "ldm.models.diffusion.ddpm_edit.LatentDiffusion": "ldm.models.diffusion.variants.LatentEditDiffusion",
    "ldm.models.diffusion.ddpm.Layout2ImgDiffusion": "ldm.models.diffusion.layout2img.Layout2ImgDiffusion",
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder": "ldm.modules.encoders.clip.FrozenCLIPEmbedder",
    "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder": "ldm.modules.encoders.open_clip.FrozenOpenCLIPEmbedder",
    "ldm.modules.encoders.modules.FrozenCLIPTextEmbedder": "ldm.modules.encoders.open_clip.FrozenCLIPTextEmbedder",
    "ldm.modules.encoders.modules.FrozenClipImageEmbedder": "ldm.modules.encoders.open_clip.FrozenClipImageEmbedder",
}
MODULE_ALIASES = {
    "taming.modules.losses.vqperceptual": "ldm.modules.losses.vqperceptual",
    "taming.data.faceshq": "ldm.data.faceshq",
    "torchvision.transforms": "ldm.data.laion",  # the four that published configs of shards use
    "cldm.cldm": "ldm.models.diffusion.controlnet",
}

EXTRAS = {"bitsandbytes": "bitsandbytes"}  # optional packages that configs may name -> the extra of setup.py
DEFAULT_TARGETS = {"noise_config": "ldm.models.diffusion.training_noise.TrainingNoise"}  # sections with one class
_BUILT_IN_PREFIXES = (
    "bitsandbytes.optim",
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
ENVIRONMENT = "LDM_ALLOW_TARGETS"  # packages like those of --allow-targets, separated by commas
_NODE_KEYS = ("target", "params", "base_learning_rate")

# Errors of a constructor, its own or torch's, that say that its arguments are wrong together.
_BUILD_ERRORS = (AssertionError, ArithmeticError, TypeError, AttributeError, LookupError, RuntimeError)
_PLAIN = (bool, int, float, str, Sequence)


class ConfigError(ValueError):
    """An invalid YAML or override; the message is one line with the path, the value and the choices."""


def allow_targets(*prefixes: str) -> None:
    """Allow `target:` to name classes and functions of more packages, e.g. `allow_targets("my_project")`.

    A config cannot call this: only Python code, the command line and the environment variable LDM_ALLOW_TARGETS decide
    what may be imported.
    """
    for prefix in prefixes:
        _check_prefix(prefix, f"allow_targets({prefix!r})")
        if prefix not in _user_prefixes:
            _user_prefixes.append(prefix)


def _check_prefix(prefix: str, place: str) -> None:
    if not all(part.isidentifier() for part in prefix.split(".")):
        raise ValueError(f"{place}: expected a dotted package name such as 'my_project.models'")


def _allowed_by_user() -> list[str]:
    """Return the packages that the user allowed, by `allow_targets` or in the environment."""
    given = [prefix.strip().rstrip(".") for prefix in os.environ.get(ENVIRONMENT, "").split(",")]
    prefixes = [prefix for prefix in given if prefix]
    for prefix in prefixes:
        _check_prefix(prefix, f"{ENVIRONMENT}={os.environ[ENVIRONMENT]}: {prefix!r}")
    return [*_user_prefixes, *prefixes]


def resolve_alias(target: str) -> str:
    """Return the current name of a published target; return other names unchanged.

    A package that the user allowed has its own classes: research code brings a `cldm` of its own.
    """
    if target.startswith("stable_diffusion.ldm."):  # the folder of InstructPix2Pix' copy
        target = target.removeprefix("stable_diffusion.")
    if target in ALIASES:
        return ALIASES[target]
    module, _, name = target.rpartition(".")
    aliased = module in MODULE_ALIASES and not _under(module, _allowed_by_user())
    return f"{MODULE_ALIASES[module]}.{name}" if aliased else target


def check_allowed(target: Any) -> str:
    """Return a target's current name; raise ConfigError unless it is under an allowed prefix. Imports nothing."""
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")) or "." not in target:
        raise ConfigError(f"target {target!r}: expected a dotted name such as 'ldm.models.autoencoder.AutoencoderKL'")
    resolved = resolve_alias(target)
    if any(part.startswith("_") for part in resolved.split(".")) and not _under(resolved, _allowed_by_user()):
        raise ConfigError(f"target {target!r}: names that begin with an underscore are private and not allowed")
    if not _is_allowed(resolved):
        near, package = closest(target, ALIASES, cutoff=0.6), target.split(".")[0]
        if package in sys.stdlib_module_names or package == "posix":
            # Never suggest --allow-targets for standard-library modules.
            advice = "It is a standard-library module; configs may not reference it"
        else:
            advice = (
                f"For your own code run with --allow-targets {package}, set {ENVIRONMENT}={package} or call "
                f"ldm.util.allow_targets({package!r})"
            )
        raise ConfigError(
            f"target {target!r} is not allowed{f' (did you mean {near}?)' if near else ''}. "
            f"Allowed packages: {', '.join((*_BUILT_IN_PREFIXES, *_allowed_by_user()))}. {advice}"
        )
    return resolved


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """Return the class that a dotted name refers to.

    Raises ConfigError if the name is not under an allowed prefix (checked before anything is imported), does not exist,
    or was imported by an allowed module from elsewhere.
    """
    module_name, name = check_allowed(string).rsplit(".", 1)
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


def instantiate_from_config(config: Any, **extra: Any) -> Any:
    """Build the object that `{"target": ..., "params": {...}}` describes; `extra` arguments are added to the params.

    Returns None for `__is_first_stage__` and `__is_unconditional__`, which the model interprets itself.
    Raises ConfigError, with the YAML path and the nearest valid name, for an invalid target or parameter.
    """
    if isinstance(config, str) and config in (FIRST_STAGE_AS_CONDITION, UNCONDITIONAL):
        return None
    full_key = getattr(config, "_get_full_key", None)  # an OmegaConf node knows its path, model.params.unet_config
    path = full_key(None) if full_key is not None else ""
    if not isinstance(config, Mapping) or "target" not in config:
        shown = sorted(map(str, config)) if isinstance(config, Mapping) else repr(config)
        raise ConfigError(f"{path or 'config'}: expected a mapping with the key 'target', got {shown}")
    target = config["target"]
    try:
        cls = get_obj_from_str(target)
    except ConfigError as error:
        raise ConfigError(f"{join_path(path, 'target')}: {error}") from error
    params = config.get("params") or {}
    if not isinstance(params, Mapping):
        raise ConfigError(f"{join_path(path, 'params')}: expected a mapping of arguments of {target}, got {params!r}")
    params = {**params, **extra}
    names = accepted_params(cls)
    check_keys(config, names[0] if names is not None else (), target, path)
    if names is not None:
        check_params(params, *names, target, path)
        params = convert_params(params, names[0], join_path(path, "params"))
    try:
        return cls(**params)
    except Exception as error:
        if (located := _located(error, target, path, params)) is not None:
            raise located from error
        if not (path and str(error).startswith(f"{path}.")):
            error.add_note(f"while building {target}" + (f" ({path})" if path else ""))
        raise


def build_section(name: str, config: Any, base: type[Built]) -> Built:
    """Build the object of a section `name` of a class's arguments, `base()` without the section.

    Raises ValueError unless it is a `base`.
    """
    if isinstance(config, Mapping) and "target" not in config and name in DEFAULT_TARGETS:
        config = {"target": DEFAULT_TARGETS[name], **config}
    built = base() if config is None else instantiate_from_config(config)
    if not isinstance(built, base):
        choices = ", ".join(f"{cls.__module__}.{cls.__name__}" for cls in (base, *base.__subclasses__()))
        raise ValueError(f"{name}.target {config['target']}: expected {base.__name__} or a subclass, such as {choices}")
    return built


def describe_section(built: object, published: type) -> str:
    """Return the class of a section's object and its arguments; an empty string for `published` with its defaults."""
    arguments = inspect.signature(type(built)).parameters
    values = {name: getattr(built, name) for name in arguments if hasattr(built, name)}
    if type(built) is published:
        values = {name: value for name, value in values.items() if value != arguments[name].default}
        if not values:
            return ""
    shown = (name if value is True else f"{name} {value}" for name, value in values.items() if value is not False)
    text = ", ".join(shown)
    return type(built).__name__ + (f"({text})" if text else "")


def _located(error: Exception, target: str, path: str, params: Mapping[str, Any]) -> ConfigError | None:
    """Return a constructor's error as a ConfigError with the YAML path; None for one that says enough by itself."""
    kind, text = type(error), " ".join(str(error).split())
    if kind in (ValueError, ConfigError):
        # A constructor names its parameter first: "timesteps 0: choose ...".
        first, where = re.split(r"[ :.=]", text, maxsplit=1)[0], join_path(path, "params")
        inside = [key for key, value in params.items() if isinstance(value, Mapping) and first in value]
        if (first in params or inside) and not text.startswith(f"{where}."):
            return ConfigError(f"{where}.{text}" if first in params else f"{where}.{inside[0]}.{text}")
        return None
    own = kind.__module__.startswith("ldm.")
    if (
        own
        or is_out_of_memory(error)
        or not (isinstance(error, _BUILD_ERRORS) or kind.__name__ == "MisconfigurationException")
    ):
        return None
    reason = f"{kind.__name__}: {text}" if text else kind.__name__
    return ConfigError(
        f"{path or 'config'}: {target} cannot be built with {_values(params)}: {reason} (--debug shows where)"
    )


def accepted_params(cls: Any) -> tuple[dict[str, str], set[str]] | None:
    """Return ({accepted: annotation}, required) arguments of a class, following **kwargs to its bases.

    None if it takes anything.
    """
    accepted: dict[str, str] = {}
    required: set[str] = set()
    is_class = inspect.isclass(cls)
    constructors = [vars(c)["__init__"] for c in cls.__mro__ if "__init__" in vars(c)] if is_class else [cls]
    for position, constructor in enumerate(constructors):
        try:
            parameters = list(inspect.signature(constructor).parameters.values())[is_class:]  # without self
        except (TypeError, ValueError):
            return None
        for p in parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                accepted.setdefault(p.name, _annotation(p))
                # Only the class's own: it may itself supply what its bases require.
                if p.default is p.empty and position == 0:
                    required.add(p.name)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return accepted, required
    return None


def check_keys(node: Iterable[Any], accepted: Collection[str], target: str, path: str) -> None:
    """Check the keys next to a `target`: research code adds its own, which are logged once as unused.

    accepted: arguments of the target. Raises ConfigError for one of them, and for a misspelt `params`.
    """
    params = join_path(path, "params")
    known = (*_NODE_KEYS, "weight") if path.endswith("]") else _NODE_KEYS  # the weight of a dataset in a mixture's list
    unknown = [str(key) for key in node if key not in known]
    for key in unknown:
        near = closest(key, known, cutoff=0.7)
        if key in accepted or near:
            meant = key not in accepted and near != "params"
            advice = f"did you mean {near!r}?" if meant else f"arguments of {target} go under {params}"
            raise ConfigError(f"{join_path(path, key)}: unknown key next to target; {advice}")
    log_unused(path or "config", unknown)


# Arguments of the classes of Stability's Stable Diffusion v2, with what replaces them here.
STABILITY = {
    "ucg_training": "for classifier-free guidance set model.params.cond_dropout to the probability",
    "ucg_rate": "for classifier-free guidance set model.params.cond_dropout to the probability",
    "make_it_fit": "remove it: weights of other shapes are named when they are loaded",
    "reset_ema": "remove it: without EMA weights in the file, the EMA starts from the regular ones",
    "reset_num_ema_updates": "remove it: a new run counts the updates of its EMA from 0",
    "force_null_conditioning": "remove it: an empty text is the null condition",
    "ema_decay": "remove it: main.py trains the autoencoder without EMA",
    "adm_in_channels": "only num_classes is supported, as an integer",
    "use_bf16": "remove it and pass --precision bf16-mixed",
}


def check_params(
    params: Mapping[str, Any], accepted: Collection[str], required: Collection[str], target: str, path: str
) -> None:
    """Raise ConfigError for unknown or missing parameters of the node at `path`."""
    where = join_path(path, "params")
    for key in params:
        if key not in accepted:
            advice = f"; {STABILITY[key]}" if key in STABILITY else did_you_mean(str(key), accepted)
            raise ConfigError(f"{where}.{key}: {target} takes no such parameter{advice}")
    if missing := sorted(set(required) - set(params)):
        raise ConfigError(f"{where}: {target} needs {', '.join(missing)}")


def convert_params(params: Mapping[str, Any], annotations: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return the parameters below the path `where` (or flags: '--') as their annotations' types.

    Raises ConfigError for other values.
    """
    converted: dict[str, Any] = {}
    for key, value in params.items():
        try:
            converted[key] = convert(value, annotations.get(key, ""))
        except ValueError as error:
            place = f"{where}{key}" if where == "--" else join_path(where, key)
            raise ConfigError(f"{place} {shown(value)}: {error}") from None
    return converted


def join_path(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def value_at(node: Any, *keys: str) -> Any:
    """The value under nested keys of a config; None if a key is missing."""
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _import_module(module_name: str, target: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if missing in EXTRAS:
            raise ConfigError(f"target {target!r}{missing_extra(missing)}") from error
        if f"{module_name}.".startswith(f"{missing}.") or missing in module_name.split("."):
            advice = "" if "." in missing else "; is the folder that holds it on PYTHONPATH?"
            raise ConfigError(f"target {target!r}: no module named {missing}{advice}") from error
        package = missing.split(".")[0]
        raise ConfigError(
            f"target {target!r} needs the package {missing!r}, which is not installed: pip install {package}"
        ) from error


def missing_extra(package: str) -> str:
    """Return the end of a message about a package of EXTRAS that is not installed."""
    return f': {package} is not installed; pip install -e ".[{EXTRAS[package]}]" adds it'


def _annotation(parameter: inspect.Parameter) -> str:
    annotation = parameter.annotation
    if annotation is parameter.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return or_none(text) if parameter.default is None else text


def _values(params: Mapping[str, Any]) -> str:
    """Return the plain values of parameters in one line."""
    plain = {key: shown(value) for key, value in params.items() if value is None or isinstance(value, _PLAIN)}
    text = ", ".join(f"{key} {value}" for key, value in plain.items()) or "these params"
    return text if len(text) <= 300 else f"{text[:300]}..."


def _home(obj: Any) -> str:
    return f"{getattr(obj, '__module__', '')}.{getattr(obj, '__qualname__', '')}".strip(".")


def _is_target(obj: Any) -> bool:
    """True for classes of allowed packages, and for functions of packages that the user allowed."""
    home = _home(obj)
    return _is_allowed(home) and (inspect.isclass(obj) or (_under(home, _allowed_by_user()) and callable(obj)))


def _is_allowed(name: str) -> bool:
    return _under(name, (*_BUILT_IN_PREFIXES, *_allowed_by_user()))


def _under(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
