"""What the nodes of a config name: classes that are allowed and exist, arguments that they take, weights that are there.

Nothing is imported and nothing is built, so that a mistake shows at once and not after torch, the data and half of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.config.instantiate import ConfigError, check_allowed, resolve_alias
from ldm.config.signature import classes_of_module, constructor_arguments, may_hold
from ldm.config.suggest import did_you_mean
from ldm.paths import ROOT

# Where the scripts put what they download, below the checkout.
DOWNLOADS = {
    "models/first_stage_models": "scripts/download_first_stages.sh",
    "models/ldm": "scripts/download_models.sh",
}

WEIGHTS = ("ckpt_path", "diffusion_ckpt_path")  # parameters of our classes that name a file of weights


def check_targets(config: dict[str, Any]) -> None:
    """Raises ConfigError for a target that is not allowed or is not in this package, and for params that its constructor does not take."""
    for path, target, params, keys in _nodes(config, ""):
        try:
            _check_exists(target, check_allowed(target))
        except ConfigError as error:
            raise ConfigError(f"{path}.target: {error}") from error
        for key in keys - {"target", "params", "base_learning_rate"}:
            raise ConfigError(f"{path}.{key}: unknown key beside target; arguments of {target} go under {path}.params")
        accepted = constructor_arguments(target)
        for key in params:
            if accepted is not None and key not in accepted:
                raise ConfigError(
                    f"{path}.params.{key}: {target} takes no such parameter{did_you_mean(key, list(accepted))}"
                )


def check_weights(config: dict[str, Any]) -> None:
    """Raises ConfigError for a file of weights that one of our classes names and that is not there, saying where it comes from."""
    for path, target, params, _ in _nodes(config.get("model"), "model"):
        for name in WEIGHTS:
            file, place = params.get(name), f"{path}.params.{name}"
            if isinstance(file, str) and resolve_alias(target).startswith("ldm.") and not Path(file).exists():
                raise ConfigError(
                    f"{place}: there is no file {file}; {_source(file)}, or name another with {place}=FILE"
                )


def forget_absent_weights(config: Any, typed: Collection[str] = ()) -> list[str]:
    """Set every `ckpt_path` of a resumed run's model whose file is gone to null -> "place FILE" of each.

    The run's own checkpoint holds these weights. `typed` are places on the command line, which mean what they say.
    """
    gone = []
    for path, target, params, _ in _nodes(OmegaConf.to_container(config.get("model"), resolve=True), "model"):
        file, place = params.get("ckpt_path"), f"{path}.params.ckpt_path"
        if (
            isinstance(file, str)
            and place not in typed
            and resolve_alias(target).startswith("ldm.")
            and not Path(file).exists()
        ):
            OmegaConf.update(config, place, None)
            gone.append(f"{place} {file}")
    return gone


def check_class_count(config: Any, datasets: Mapping[str, Any]) -> None:
    """Raises ConfigError where a ClassEmbedder has fewer classes than a dataset with `class_names`, or none left to mean "no class".

    Without the latter the last class of the data would be what `cond_dropout` and guidance take for no class, and nothing would show it.
    """
    params = config.model.get("params") or {}
    stage = params.get("cond_stage_config")
    if (
        not isinstance(stage, Mapping)
        or resolve_alias(str(stage.get("target"))) != "ldm.modules.encoders.modules.ClassEmbedder"
    ):
        return
    n_classes = (stage.get("params") or {}).get("n_classes", 1000)
    free = 1 if params.get("cond_dropout") else 0
    for name, dataset in datasets.items():
        names = getattr(getattr(dataset, "data", dataset), "class_names", None)  # `wrap` puts it one deeper
        if names is not None and len(names) + free > n_classes:
            why = ' and one that means "no class", for cond_dropout' if free else ""
            place = "model.params.cond_stage_config.params.n_classes"
            raise ConfigError(
                f"{place} {n_classes}: data.params.{name} has {len(names)} classes{why}; set {place}={len(names) + free}"
            )


def _nodes(node: Any, path: str) -> Iterator[tuple[str, str, dict[str, Any], set[str]]]:
    """(place, target, params, keys) of every node with a target, outer ones first.

    A target of one word, {target: eps}, is somebody's own, unless it stands where a class has to.
    """
    if isinstance(node, list):
        for position, item in enumerate(node):
            yield from _nodes(item, f"{path}[{position}]")
    if not isinstance(node, dict):
        return
    target, params = node.get("target"), node.get("params") or {}
    if isinstance(target, str) and isinstance(params, dict) and ("." in target or path in ("model", "data")):
        yield path, target, params, set(map(str, node))
    for key, value in node.items():
        place = f"{path}.{key}" if path else str(key)
        if key == "params" and "target" in node and isinstance(value, dict):  # an argument may be called target too
            for name, argument in value.items():
                yield from _nodes(argument, f"{place}.{name}")
        else:
            yield from _nodes(value, place)


def _check_exists(target: str, resolved: str) -> None:
    """Only of this package is the text sure to say what a module holds."""
    if not resolved.startswith("ldm."):
        return
    module, _, name = resolved.rpartition(".")
    classes = classes_of_module(module)
    if classes is None:
        raise ConfigError(f"target {target!r}: there is no module {module}{did_you_mean(module, _modules())}")
    if not may_hold(module, name):
        raise ConfigError(f"target {target!r}: module {module} has no {name!r}{did_you_mean(name, classes)}")


def _modules() -> list[str]:
    package = Path(__file__).parents[1]
    files = [file.relative_to(package.parent).with_suffix("") for file in package.rglob("*.py")]
    return [".".join(file.parts).removesuffix(".__init__") for file in files]


def _source(file: str) -> str:
    """Where a file of weights is to be had."""
    inside = Path(file)
    if inside.is_absolute() and inside.is_relative_to(ROOT):
        inside = inside.relative_to(ROOT)
    if not inside.is_absolute() and (ROOT / inside).exists():
        return f"it is in {ROOT}: start there"
    for folder, script in DOWNLOADS.items():
        # Beside each released model stands its config.
        if inside.is_relative_to(folder) and (ROOT / inside).with_name("config.yaml").is_file():
            return f"it comes with: bash {script}"
    return "put it there"
