"""The validator of configs: sections and keys, targets and their parameters, files of weights, class counts.

Classes are read as source text: nothing is imported or built, so a mistake shows before torch is loaded.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.consistency import ADAPTERS, check_consistency
from ldm.config.instantiate import (
    DEFAULT_TARGETS,
    EXTRAS,
    ConfigError,
    check_allowed,
    check_keys,
    check_params,
    convert_params,
    join_path,
    missing_extra,
    resolve_alias,
    value_at,
)
from ldm.config.signature import class_exists, classes_of_module, constructor_arguments
from ldm.config.suggest import closest, did_you_mean
from ldm.config.trainer_keys import COMPILERS, LOGGER_TYPES, UNSUPPORTED, trainer_keys, trainer_types
from ldm.config.types import arguments_of, shown
from ldm.paths import ROOT, SD_CKPT, SD_SOURCE

SECTIONS = ("model", "data", "lightning")
_LIGHTNING = ("trainer", "callbacks", "modelcheckpoint", "logger", "seed", "scale_lr", "compile")

# Parameters of models that hold a target, besides `model`, `data`, datasets and callbacks.
_BUILT = (
    *("unet_config", "first_stage_config", "cond_stage_config", "control_stage_config", "lossconfig"),
    *("scheduler_config", "loss_weighting_config", "noise_config", "timestep_config", "optimizer_config"),
)

# Folders below the checkout that the download scripts fill.
DOWNLOADS = {
    "models/first_stage_models": "scripts/download_first_stages.sh",
    "models/ldm": "scripts/download_models.sh",
}
_RUN_TYPES = {
    "seed": "Annotated[int, '[0, 4294967295]'] | None",
    "scale_lr": "bool | None",
    "compile": f"Literal{list(COMPILERS)} | None",
}
_MODEL_TYPES = {"base_learning_rate": "PositiveFloat | None"}
WEIGHTS = ("ckpt_path", "diffusion_ckpt_path")  # parameters of our classes that name a file of weights


class _Node(NamedTuple):
    path: str  # in the YAML
    target: str
    params: dict[str, Any]
    keys: list[str]


def check_sections(config: Mapping, where: str) -> None:
    """Raise ConfigError for unknown keys at the top, under `lightning` and under `lightning.trainer`.

    where: the file or override that `config` comes from.
    """
    _check_known(config, (*SECTIONS, "safety"), where, "")  # `safety` is read by the sampling scripts
    lightning = config.get("lightning")
    if lightning is None:
        return
    if not isinstance(lightning, Mapping):
        choices = ", ".join(_LIGHTNING)
        raise ConfigError(f"{where}: lightning: expected a mapping with the keys {choices}, got {lightning!r}")
    _check_known(lightning, _LIGHTNING, where, "lightning.")
    trainer = lightning.get("trainer") or {}
    if not isinstance(trainer, Mapping):
        raise ConfigError(f"{where}: lightning.trainer: expected a mapping of Trainer settings, got {trainer!r}")
    for key in trainer:
        if key in UNSUPPORTED:
            raise ConfigError(f"{where}: lightning.trainer.{key}: {UNSUPPORTED[key]}")
    _check_known(trainer, sorted(trainer_keys()), where, "lightning.trainer.")


def convert_types(config: DictConfig) -> None:
    """Convert the values of a config in place to the types that their classes, the Trainer and the run expect.

    Raises ConfigError with the path, the value and what was expected. Interpolations are left to `check_targets`.
    """
    plain: Any = OmegaConf.to_container(config, resolve=False)
    groups: list[tuple[str, Any, Mapping[str, str]]] = []
    lightning = plain.get("lightning")
    if isinstance(lightning, dict):
        groups += [
            ("lightning", lightning, _RUN_TYPES),
            ("lightning.trainer", lightning.get("trainer"), trainer_types()),
            ("lightning.logger.params", value_at(lightning, "logger", "params"), LOGGER_TYPES),
        ]
    groups.append(("model", plain.get("model"), _MODEL_TYPES))
    for path, target, params, _ in _nodes(plain, ""):
        arguments: Mapping[str, str] = constructor_arguments(target) or {}
        groups.append((f"{path}.params", params, arguments))
        for name, annotation in arguments.items():
            if (inner := arguments_of(annotation)) is not None:
                groups.append((f"{path}.params.{name}", params.get(name), constructor_arguments(inner) or {}))
    for where, values, types in groups:
        given = values if isinstance(values, dict) else {}
        for key, value in convert_params(given, types, where).items():
            if value is not given[key]:
                OmegaConf.update(config, f"{where}.{key}", value, merge=False)


def check_config(config: DictConfig, weights: bool = True, problems: bool = True) -> None:
    """Raise ConfigError if a merged training config lacks a section or has an invalid target or parameter.

    weights: also check that the files of weights exist. problems: False leaves `consistency_problems` and
    `weights_problems` to the caller.
    """
    for section in ("model", "data"):
        node = config.get(section)
        if not isinstance(node, DictConfig) or "target" not in node:
            raise ConfigError(f"{section}: missing; add a YAML with {section}.target and {section}.params to --base")
    check_targets(plain := _plain(config))
    for path, target, *_ in _nodes(plain, ""):
        package = target.split(".")[0]
        if package in EXTRAS and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{path}.target {target}{missing_extra(package)}")
    if not problems:
        return
    check_consistency(plain)
    for problem in weights_problems(config) if weights else ():
        raise ConfigError(problem)


def weights_problems(config: DictConfig) -> Iterator[str]:
    """Yield a line for every file of weights that a merged training config needs and that is missing."""
    plain = _plain(config)
    params, target = plain["model"].get("params") or {}, resolve_alias(plain["model"]["target"])
    if not params.get("ckpt_path") and target.startswith("ldm.") and any(params.get(name) for name in ADAPTERS):
        place = "model.params.ckpt_path"
        yield f"{place}: not set; adapters and tokens train on a base: set {place} to its weights"
    for place, file in _missing_weights(config):
        yield f"{place}: no such file: {file}; {_source(file)}, or choose another with {place}=FILE"
    for place, file in _paths_of_weights(config):
        if (Path(file) / "checkpoints" / "last.ckpt").is_file():
            yield f"{place}: {file} is a run directory; set {place}={file}/checkpoints/last.ckpt"


def check_targets(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a target that is not allowed or does not exist, and for parameters it does not take."""
    nodes = list(_nodes(config, ""))
    sections: dict[str, Mapping[str, str]] = {}  # by path: keys of the sections that an outer class reads
    for path, target, params, keys in nodes:
        _check_dotted(target, path)
        try:
            _check_exists(target, check_allowed(target))
        except ConfigError as error:
            raise ConfigError(f"{path}.target: {error}") from error
        arguments = constructor_arguments(target)
        check_keys([key for key in keys if key not in sections.get(path, ())], arguments or (), target, path)
        if arguments is not None:
            check_params(params, arguments, (), target, path)  # the class that builds the node may add required ones
        for name, annotation in (arguments or {}).items():
            inner, section = arguments_of(annotation), params.get(name)
            known = constructor_arguments(inner) if inner is not None else None
            if known is not None and isinstance(section, Mapping):
                place = join_path(path, f"params.{name}")
                sections[place] = known
                if name == "optimizer_config":
                    _check_optimizer_keys(section, known, place)
                _check_known(section, known, join_path(path, "params"), f"{name}.")
                convert_params(section, known, place)
    for path, target, params, _ in nodes:
        convert_params(params, constructor_arguments(target) or {}, join_path(path, "params"))


def forget_missing_weights(config: DictConfig, typed: Collection[str] = ()) -> list[str]:
    """Set to null each `ckpt_path` of a resumed run's model whose file is missing; return "path FILE" of each.

    The run's own checkpoint holds these weights. Paths in `typed` (given on the command line) are left alone.
    """
    missing = {place: file for place, file in _missing_weights(config) if place.endswith(".ckpt_path")}
    if any(config.model.params.get(name) for name in ADAPTERS):  # the checkpoint holds them without their base
        missing.pop("model.params.ckpt_path", None)
    forgotten = [place for place in missing if place not in typed]
    for place in forgotten:
        OmegaConf.update(config, place, None)
    return [f"{place} {missing[place]}" for place in forgotten]


def check_class_count(config: DictConfig, datasets: Mapping[str, Any]) -> None:
    """Raise ConfigError if a ClassEmbedder has fewer classes than a dataset's `class_names`.

    `cond_dropout` needs one more class, "no class": without it the data's last class is trained as unconditional.
    """
    params = config.model.get("params") or {}
    stage = params.get("cond_stage_config")
    embedder = "ldm.modules.encoders.modules.ClassEmbedder"
    if not isinstance(stage, Mapping) or resolve_alias(str(stage.get("target"))) != embedder:
        return
    n_classes = (stage.get("params") or {}).get("n_classes", 1000)
    free = 1 if params.get("cond_dropout") else 0
    for name, dataset in datasets.items():
        names = getattr(getattr(dataset, "data", dataset), "class_names", None)  # `wrap` nests the dataset in `data`
        if names is not None and len(names) + free > n_classes:
            why = ' and cond_dropout needs one more for "no class"' if free else ""
            place, needed = "model.params.cond_stage_config.params.n_classes", len(names) + free
            raise ConfigError(
                f"{place} {n_classes}: data.params.{name} has {len(names)} classes{why}; set {place}={needed}"
            )


def _check_dotted(target: str, path: str) -> None:
    """Raise ConfigError for the name of a known class without its module, its beginning, or one like it."""
    if "." in target:
        return
    known = {name: f"torch.optim.{name}" for name in classes_of_module("torch.optim") or ()}
    for file in sorted((ROOT / "ldm").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for name in re.findall(r"^class ([A-Z]\w*)", file.read_text(encoding="utf-8"), re.MULTILINE):
            known.setdefault(name, f"{module}.{name}")
    near = closest(target, known, cutoff=0.7) or next((name for name in known if name.startswith(target)), None)
    if near is not None:
        raise ConfigError(f"{path}.target {target!r}: expected a dotted name; did you mean {known[near]!r}?")


def _check_optimizer_keys(section: Mapping, known: Collection[str], place: str) -> None:
    """Raise ConfigError for an argument of the optimizer next to its target."""
    arguments = constructor_arguments(str(section.get("target") or "torch.optim.AdamW")) or ()
    for key in section:
        if key in arguments and key not in known:
            advice = (
                "set model.base_learning_rate" if key == "lr" else f"arguments of the optimizer go under {place}.params"
            )
            raise ConfigError(f"{place}.{key}: unknown key; {advice}")


def _check_known(config: Mapping, known: Iterable[str], where: str, prefix: str) -> None:
    for key in config:
        if str(key).removeprefix("~") not in (*known, "_replace_"):
            raise ConfigError(f"{where}: unknown key {prefix}{key}{did_you_mean(str(key), known)}")


def _plain(config: Any) -> Any:
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"config: {error_line(error)}") from error


def error_line(error: Exception) -> str:
    """Return the first two lines of an OmegaConf error as one."""
    return ", ".join(str(error).strip().split("\n")[:2])


def _missing_weights(config: DictConfig) -> Iterator[tuple[str, str]]:
    return (each for each in _paths_of_weights(config) if not Path(each[1]).exists())


def _paths_of_weights(config: DictConfig) -> Iterator[tuple[str, str]]:
    """Yield (path, file) of each parameter of our classes in the model that names a file of weights."""
    for path, target, params, _ in _nodes(_plain(config).get("model"), "model"):
        for name in WEIGHTS:
            file = params.get(name)
            if isinstance(file, str) and resolve_alias(target).startswith("ldm."):
                yield f"{path}.params.{name}", file


def _nodes(node: Any, path: str) -> Iterator[_Node]:
    """Yield every node with a target, outer ones first; raise ConfigError for one whose params are no mapping.

    A target without a dot, as in {target: eps}, is an ordinary argument, except where a class is expected.
    """
    if isinstance(node, list):
        for position, item in enumerate(node):
            yield from _nodes(item, f"{path}[{position}]")
    if not isinstance(node, Mapping):
        return
    parent, _, name = path.rpartition(".")
    target, params = node.get("target", DEFAULT_TARGETS.get(name)), node.get("params") or {}
    is_built = path in ("model", "data") or name in _BUILT or parent in ("data.params", "lightning.callbacks")
    if isinstance(target, str) and ("." in target or is_built):
        if not isinstance(params, dict):
            raise ConfigError(
                f"{join_path(path, 'params')} {shown(params)}: expected a mapping of arguments of {target}"
            )
        yield _Node(path, target, params, list(map(str, node)))
    for key, value in node.items():
        place = join_path(path, str(key))
        if key == "params" and "target" in node and isinstance(value, dict):  # an argument may be called target too
            for name, argument in value.items():
                yield from _nodes(argument, f"{place}.{name}")
        else:
            yield from _nodes(value, place)


def _check_exists(target: str, resolved: str) -> None:
    if not resolved.startswith(("ldm.", "torch.optim.")) or class_exists(resolved):
        return  # other packages may build classes at run time
    module, _, name = resolved.rpartition(".")
    classes = classes_of_module(module)
    if classes is None:
        files = [file.relative_to(ROOT).with_suffix("") for file in (ROOT / "ldm").rglob("*.py")]
        modules = [".".join(file.parts).removesuffix(".__init__") for file in files]
        raise ConfigError(f"target {target!r}: no module named {module}{did_you_mean(module, modules)}")
    raise ConfigError(f"target {target!r}: {module} has no class {name!r}{did_you_mean(name, classes)}")


def _source(file: str) -> str:
    """Return advice on where to get a missing file of weights."""
    inside = Path(file)
    if inside.is_absolute() and inside.is_relative_to(ROOT):
        inside = inside.relative_to(ROOT)
    if not inside.is_absolute() and (ROOT / inside).exists():
        return f"it is in {ROOT}: run from there"
    if inside == Path(SD_CKPT):
        return SD_SOURCE
    for folder, script in DOWNLOADS.items():
        # Each released model has its config in the same folder.
        if inside.is_relative_to(folder) and (ROOT / inside).with_name("config.yaml").is_file():
            of_folder = rf"^ +(\S+)={re.escape(inside.parent.relative_to('models').as_posix())} "
            named = re.search(of_folder, (ROOT / script).read_text(encoding="utf-8"), re.MULTILINE)
            return f"download it: bash {script}{f' {named[1]}' if named else ''}"
    return "add it"
