"""Requests and sweep points of an evaluation. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from ldm.config.model_info import ModelInfo, read_config
from ldm.config.suggest import did_you_mean
from ldm.inference.requests import (
    GUIDANCE_SCALE,
    ClassConditionalRequest,
    ConditionalRequest,
    TextToImageRequest,
    script_for,
)
from ldm.inference.settings import Request, require

SWEEPS = ("scale", "steps", "sampler", "eta", "spacing", "seed", "guidance_rescale", "deep_cache", "token_merging")
MAX_POINTS = 200
OUTPUTS = Path("outputs/evaluation")
_REQUESTS: dict[str, type[Request]] = {
    "scripts/txt2img.py": TextToImageRequest,
    "scripts/sample_diffusion.py": ClassConditionalRequest,
}


class Point(NamedTuple):
    """A point of a sweep: its values by name, and its checked request."""

    values: Mapping[str, Any]
    request: Request

    @property
    def name(self) -> str:
        """The name of its folder."""
        return "-".join(
            value if isinstance(value, str) else f"{name}{value:.12g}" for name, value in self.values.items()
        )


def request_type(info: ModelInfo) -> type[Request]:
    """The request of the script that samples this model: of prompts, of classes, or of the conditions of a dataset."""
    return _REQUESTS.get(script_for(info), ConditionalRequest)


def usual_scale(info: ModelInfo) -> float | None:
    """The guidance scale without --scale: 3 for a run that trained with cond_dropout, else the script's default."""
    params = info.config["model"].get("params") or {}
    kind = request_type(info)
    return GUIDANCE_SCALE if info.own_size and params.get("cond_dropout") and info.takes_text else kind.scale


def parse_sweep(texts: Sequence[str]) -> dict[str, list[Any]]:
    """The values of `--sweep NAME=V,V,...` flags by name; raise ValueError for an unknown name or a wrong value."""
    types = {field.name: str(field.type) for field in fields(Request)}
    swept: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        require(bool(equals and values), f"--sweep {text}: expected NAME=VALUE,VALUE,..., e.g. scale=1,1.5,2")
        require(name in SWEEPS, f"--sweep {name}: unknown setting{did_you_mean(name, SWEEPS)}")
        require(name not in swept, f"--sweep {name} is given twice: write all values in one flag")
        convert: Any = str if types[name].startswith("str") else int if types[name].startswith("int") else float
        try:
            swept[name] = list(dict.fromkeys(convert(value) for value in values.split(",")))
        except ValueError as error:
            kind = "whole numbers" if convert is int else "numbers"
            raise ValueError(f"--sweep {text}: expected {kind}, separated by commas") from error
    points = 1
    for each in swept.values():
        points *= len(each)
    require(points <= MAX_POINTS, f"--sweep: {points} points, choose at most {MAX_POINTS}")
    return swept


def points_of(request: Request, swept: Mapping[str, Sequence[Any]], info: ModelInfo) -> list[Point]:
    """The checked request of every combination of the swept values."""
    combinations = itertools.product(*swept.values())
    values = [dict(zip(swept, each)) for each in combinations]
    try:
        return [Point(each, replace(request, **each).checked(info)) for each in values]
    except ValueError as error:  # it names the flags of the model's own script
        text = str(error).replace(request.steps_flag, "--steps").replace(request.eta_flag, "--ddim_eta")
        raise ValueError(text) from error


def has_field(kind: type[Request], name: str) -> bool:
    return any(field.name == name for field in fields(kind))


def is_first_stage(configs: Sequence[Path]) -> bool:
    """True for the config of an autoencoder."""
    params = read_config(configs).model.get("params") or {}
    return "ddconfig" in params and "unet_config" not in params


def of_model(overrides: Sequence[str]) -> list[str]:
    """The overrides of a command line that change the model, not its data."""
    return [word for word in overrides if word.lstrip("+~").startswith("model.")]


def without_places(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a model (see `identify`) without paths: files that were moved have the same fingerprints."""
    return {name: value for name, value in identity.items() if name not in ("ckpt", "config")}
