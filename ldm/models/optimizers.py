"""The section `optimizer_config`: any optimizer class, groups of parameters, AdamW beside Muon."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ldm.config.instantiate import ConfigError, get_obj_from_str
from ldm.config.suggest import did_you_mean

PLACE = "model.params.optimizer_config"
_GROUP_KEYS = ("match", "lr_factor", "params")
_GIVEN = ("params", "lr")  # arguments of an optimizer that the run decides
_KERNELS = ("foreach", "fused", "capturable", "differentiable")  # arguments that choose an implementation


@dataclass(frozen=True)
class OptimizerConfig:
    """The section `optimizer_config` of a trained module.

    target, params: class of the optimizer and its arguments, except the learning rate; without a target the module's
        published optimizer.
    no_decay: no weight decay for biases, norms and embeddings: rows of an embedding that a batch lacks would shrink
        without a gradient.
    groups: a list of `{match: PATTERN, lr_factor: 0.1, params: {...}}` for the parameters whose names have the regular
        expression PATTERN anywhere; the first match counts. `params` are further arguments of the optimizer.
    rest: `{params: {...}}`, arguments of AdamW for the parameters that Muon does not take.
    """

    target: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    no_decay: bool = False
    groups: Sequence[Mapping[str, Any]] = ()
    rest: Mapping[str, Any] | None = None


@dataclass
class _Group:
    """Parameters with the same settings. name: for logs, None if the config has no groups."""

    cls: type[Optimizer]
    name: str | None
    lr_factor: float
    options: dict[str, Any]
    names: list[str]


def make_optimizers(
    module: nn.Module,
    parts: Sequence[tuple[Sequence[nn.Parameter], float]],
    config: OptimizerConfig | None,
    published: type[Optimizer],
    published_options: Mapping[str, Any],
) -> list[Optimizer]:
    """Return an optimizer for each of (parameters of `module`, learning rate).

    published: the class without a config. published_options: its arguments, and those of another class that takes them.
    Raises ConfigError for a class that is not an optimizer, arguments that it lacks, and patterns that match nothing.
    """
    device = next((parameter.device for parameters, _ in parts for parameter in parameters), torch.device("cpu"))
    if config is None:
        plain = {**_fast(published, device), **published_options}
        return [_guarded(_new(published, parameters, {"lr": rate, **plain}), published) for parameters, rate in parts]
    cls = published if config.target is None else _optimizer_class(config.target)
    options = _options(cls, config.params, f"{PLACE}.params")
    accepted = _arguments(cls)
    options = {**{key: value for key, value in published_options.items() if key in accepted}, **options}
    names = {id(parameter): name for name, parameter in module.named_parameters(remove_duplicate=False)}
    named = [({names[id(p)]: p for p in parameters}, rate) for parameters, rate in parts]
    groups = _groups(module, [name for parameters, _ in named for name in parameters], config, cls)
    classes: dict[type[Optimizer], Mapping[str, Any]] = {cls: options}
    rest = _rest_options(config, cls)
    if cls is torch.optim.Muon:
        groups = [part for group in groups for part in _rest_to_adamw(module, group)]
        if not any(group.cls is cls and group.names for group in groups):
            problem = "it takes 2D weights, and this model has none; choose torch.optim.AdamW"
            raise ConfigError(f"{PLACE}.target torch.optim.Muon: {problem}")
        # Moonlight's scaling (arXiv 2502.16982, eq. 4): a learning rate of AdamW then suits Muon too.
        classes = {cls: {"adjust_lr_fn": "match_rms_adamw", **options}, torch.optim.AdamW: rest}
    built: list[Optimizer] = []
    for parameters, rate in named:
        optimizers: list[Optimizer] = []
        for part, part_options in classes.items():
            chosen = [_param_group(group, parameters, rate) for group in groups if group.cls is part]
            chosen = [group for group in chosen if group["params"]]
            if chosen:
                fast = {} if {"foreach", "fused"} & set(part_options) else _fast(part, device)
                optimizers.append(_build(part, chosen, {"lr": rate, **fast, **part_options}))
        combined = optimizers[0] if len(optimizers) == 1 else JointOptimizer(optimizers)
        built.append(_guarded(combined, published))
    return built


def _param_group(group: _Group, parameters: Mapping[str, nn.Parameter], rate: float) -> dict[str, Any]:
    """Return a group of parameters in PyTorch's form; `optimizer` and `name` are kept in checkpoints."""
    chosen = [parameters[name] for name in group.names if name in parameters]
    described = {"optimizer": _name_of(group.cls), **({} if group.name is None else {"name": group.name})}
    return {"params": chosen, "lr": group.lr_factor * rate, **described, **group.options}


def _groups(module: nn.Module, names: Sequence[str], config: OptimizerConfig, cls: type[Optimizer]) -> list[_Group]:
    """Return the groups of a config, in the published order of the parameters within each."""
    asked = bool(config.groups) or config.no_decay
    groups = [_Group(cls, "default" if asked else None, 1.0, {}, [])]
    patterns: list[re.Pattern[str]] = []
    for place, section in enumerate(config.groups):
        where = f"{PLACE}.groups[{place}]"
        if not isinstance(section, Mapping):
            raise ConfigError(f"{where} {section!r}: expected {{match: PATTERN}} with lr_factor or params")
        for key in section:
            if key not in _GROUP_KEYS:
                hint = f"; arguments of the optimizer go under {where}.params" if key in _arguments(cls) else ""
                hint = "; set lr_factor, which multiplies the learning rate" if key == "lr" else hint
                raise ConfigError(f"{where}.{key}: unknown key{hint or did_you_mean(str(key), _GROUP_KEYS)}")
        patterns.append(_pattern(section.get("match"), f"{where}.match"))
        factor = section.get("lr_factor", 1.0)
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise ConfigError(f"{where}.lr_factor {factor!r}: expected a number > 0")
        options = _options(cls, section.get("params") or {}, f"{where}.params")
        groups.append(_Group(cls, patterns[-1].pattern, float(factor), options, []))
    for name in names:
        matching = (place for place, pattern in enumerate(patterns, 1) if pattern.search(name))
        groups[next(matching, 0)].names.append(name)
    for place, (pattern, group) in enumerate(zip(patterns, groups[1:])):
        if not group.names:
            _refuse_pattern(pattern, f"{PLACE}.groups[{place}].match", names)
    if config.no_decay:
        if "weight_decay" not in _arguments(cls):
            raise ConfigError(f"{PLACE}.no_decay true: {_name_of(cls)} has no weight_decay; remove it")
        groups = [part for group in groups for part in _without_decay(module, group)]
    return [group for group in groups if group.names]


def _without_decay(module: nn.Module, group: _Group) -> list[_Group]:
    """Split a group into the parameters with weight decay and those without."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    decayed = {name for name in group.names if parameters[name].ndim >= 2 and not _is_embedding(module, name)}
    without = replace(group, name=f"{group.name}, no decay", options={**group.options, "weight_decay": 0.0})
    return _split(group, decayed, without)


def _rest_to_adamw(module: nn.Module, group: _Group) -> list[_Group]:
    """Split a group into the matrices, for Muon, and the rest, for AdamW."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    matrices = {name for name in group.names if parameters[name].ndim == 2 and not _is_embedding(module, name)}
    name = None if group.name is None else f"{group.name} (AdamW)"  # unique in Lightning's logs
    return _split(group, matrices, replace(group, cls=torch.optim.AdamW, name=name))


def _split(group: _Group, chosen: set[str], rest: _Group) -> list[_Group]:
    """Return `group` with those of its names that are in `chosen`, and `rest` with the others, in their order."""
    names = [name for name in group.names if name in chosen], [name for name in group.names if name not in chosen]
    return [replace(group, names=names[0]), replace(rest, names=names[1])]


def _is_embedding(module: nn.Module, name: str) -> bool:
    owner, _, own = name.rpartition(".")
    return isinstance(module.get_submodule(owner), nn.Embedding) or "embedding" in own


def _pattern(text: Any, where: str) -> re.Pattern[str]:
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{where} {text!r}: expected a part of parameter names, as a regular expression, e.g. attn2")
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"{where} {text!r}: not a regular expression: {error}") from error


def _refuse_pattern(pattern: re.Pattern[str], where: str, names: Sequence[str]) -> None:
    """Raise ConfigError for a pattern without parameters of its own, with the nearest part of a name."""
    if any(pattern.search(name) for name in names):
        raise ConfigError(
            f"{where} {pattern.pattern!r}: all parameters that it matches are in earlier groups; put it first"
        )
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    near = did_you_mean(pattern.pattern.strip("^.$"), parts)
    near = near if "did you mean" in near else f"; names are e.g. {', '.join(names[:: max(1, len(names) // 3)][:3])}"
    raise ConfigError(f"{where} {pattern.pattern!r}: matches no trained parameter{near}")


def _optimizer_class(target: str) -> type[Optimizer]:
    try:
        cls = get_obj_from_str(target)
    except ConfigError as error:
        raise ConfigError(f"{PLACE}.target: {error}") from error
    if not (inspect.isclass(cls) and issubclass(cls, Optimizer)):
        raise ConfigError(f"{PLACE}.target: {target} is not an optimizer (a subclass of torch.optim.Optimizer)")
    if cls is torch.optim.SparseAdam:
        problem = "takes sparse gradients, which no model here has; choose torch.optim.AdamW"
        raise ConfigError(f"{PLACE}.target {target}: {problem}")
    return cls


def _arguments(cls: type[Optimizer]) -> list[str]:
    return list(inspect.signature(cls).parameters)


def _options(cls: type[Optimizer], params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return checked arguments of an optimizer as plain values."""
    if not isinstance(params, Mapping):
        raise ConfigError(f"{where} {params!r}: expected a mapping of arguments")
    arguments = inspect.signature(cls).parameters
    accepted = [name for name in arguments if name not in _GIVEN]
    takes_more = any(p.kind is p.VAR_KEYWORD for p in arguments.values())
    for key, value in params.items():
        if key == "lr":
            raise ConfigError(f"{where}.lr: set model.base_learning_rate, and lr_factor of groups")
        if key not in accepted and not takes_more:
            raise ConfigError(
                f"{where}.{key}: {_name_of(cls)} takes no such argument{did_you_mean(str(key), accepted)}"
            )
        several = isinstance(value, Sequence) and not isinstance(value, str)
        if any(isinstance(each, float) and not math.isfinite(each) for each in (value if several else [value])):
            raise ConfigError(f"{where}.{key} {value}: expected finite numbers")
        default = arguments[key].default if key in arguments else None
        if isinstance(default, tuple) and not (several and len(value) == len(default)):
            raise ConfigError(f"{where}.{key} {value}: expected {len(default)} values, such as {list(default)}")
    # Lists of a YAML, such as betas: a tuple compares equal to what a checkpoint holds.
    return {
        key: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for key, value in params.items()
    }


def _rest_options(config: OptimizerConfig, cls: type[Optimizer]) -> dict[str, Any]:
    if config.rest is None:
        return {}
    if cls is not torch.optim.Muon:
        raise ConfigError(f"{PLACE}.rest: only torch.optim.Muon leaves parameters to another optimizer; remove it")
    for key in config.rest:
        if key != "params":
            raise ConfigError(f"{PLACE}.rest.{key}: expected params alone, arguments of torch.optim.AdamW")
    return _options(torch.optim.AdamW, config.rest.get("params") or {}, f"{PLACE}.rest.params")


def _new(cls: type[Optimizer], parameters: Any, options: Mapping[str, Any]) -> Optimizer:
    construct: Callable[..., Optimizer] = cls  # the base's constructor takes other arguments
    return construct(parameters, **options)


def _build(cls: type[Optimizer], groups: list[dict[str, Any]], options: Mapping[str, Any]) -> Optimizer:
    try:
        for group in groups:  # torch checks the defaults alone
            own = {name: group[name] for name in _arguments(cls) if name in group and name not in _GIVEN}
            if own:
                _new(cls, [nn.Parameter(torch.zeros(1, 1))], {**options, **own})
        return _new(cls, groups, options)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:  # e.g. of betas with one value
        raise ConfigError(f"{PLACE}: {_name_of(cls)} cannot be built: {' '.join(str(error).split())}") from error


def _fast(cls: type[Optimizer], device: torch.device) -> dict[str, Any]:
    # On the CPU the fused step avoids a Python loop over hundreds of small tensors; on a GPU the default is fast.
    return {"fused": True} if device.type == "cpu" and "fused" in _arguments(cls) else {}


def _name_of(cls: type[Optimizer]) -> str:
    module = "torch.optim" if cls.__module__.startswith("torch.optim.") else cls.__module__
    return f"{module}.{cls.__name__}"


def _guarded(optimizer: Optimizer, published: type[Optimizer]) -> Optimizer:
    """Let an optimizer refuse the state of another class or of other groups, which would load without an error.

    published: the class of a state without a record.
    """

    def described(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
        return [(group.get("optimizer", _name_of(published)), group.get("name", "")) for group in groups]

    def check(optimizer: Optimizer, state: dict[str, Any]) -> None:
        saved, own = described(state["param_groups"]), described(optimizer.param_groups)
        if saved != own:
            there, here = (_joined(name for name, _ in both) for both in (saved, own))
            if there == here:
                groups = ("; ".join(filter(None, (name for _, name in both))) or "no groups" for both in (saved, own))
                there, here = (f"{there} ({each})" for each in groups)
            raise ConfigError(
                f"{PLACE}: the checkpoint's optimizer is {there}, the config's {here}; undo the change, "
                "or start a new run from its weights with model.params.ckpt_path"
            )

    optimizer.register_load_state_dict_pre_hook(check)
    return optimizer


def arguments_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the arguments of each group of parameters, without the learning rate and those of an implementation."""
    found = []
    for group in optimizer.param_groups:
        part = optimizer.parts[group["optimizer"]] if isinstance(optimizer, JointOptimizer) else optimizer
        names = [name for name in _arguments(type(part)) if name in group and name not in (*_GIVEN, *_KERNELS)]
        plain = ((name, group[name]) for name in names)
        found.append({name: tuple(value) if isinstance(value, list) else value for name, value in plain})
    return found


def class_names(optimizer: Optimizer) -> str:
    """Return the classes that step the parameters of an optimizer, such as "Muon + AdamW"."""
    return _joined(str(group.get("optimizer", type(optimizer).__name__)) for group in optimizer.param_groups)


def _joined(names: Iterable[str]) -> str:
    return " + ".join(each.rpartition(".")[2] for each in dict.fromkeys(names))


class JointOptimizer(Optimizer):
    """Several optimizers as one: each steps its own groups of parameters, found by their key `optimizer`."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = {part.param_groups[0]["optimizer"]: part for part in parts}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, part in self.parts.items():  # loading a state replaces groups and states
            part.param_groups = [group for group in self.param_groups if group["optimizer"] == name]
            part.state = self.state
            part.step()
        return loss
