"""Forms of the tasks, made from the flags of their scripts and the fields of their requests. Imports no torch."""

from __future__ import annotations

import argparse
import secrets
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from ldm import inference
from ldm.cli import Parser
from ldm.config.instantiate import value_at
from ldm.config.model_info import DETECTORS, ModelInfo
from ldm.inference import cli, requests
from ldm.inference.from_metadata import check_types
from ldm.inference.settings import MAX_SEED, Request, parse_batch_size
from ldm.models.diffusion.samplers.registry import SAMPLERS

MOST_IMAGES = 100  # of one job, so that others get their turn
MOST_PIXELS = 2048**2  # of one image
MOST_CONTROLS = 3  # ControlNets at once

_HIDDEN = ("C", "f", "depth")  # facts of the model
_LABELS = {"H": "height (H)", "W": "width (W)", "vanilla_sample": "every timestep", "n_samples": "batch size"}
_LABELS |= {"n_iter": "batches", "scale": "guidance scale", "canny": "canny thresholds", "control_image": "image"}
_MAIN = (  # shown first, in this order; the others are in the accordion
    *("prompt", "negative_prompt", "detector", "classes", "sampler", "ddim_steps", "steps", "custom_steps", "scale"),
    *("image_scale", "control_scale", "strength", "H", "W", "noise_level", "feather", "n_samples", "n_iter", "seed"),
)
_SPACINGS = tuple(dict.fromkeys(spacing for entry in SAMPLERS.values() for spacing in entry.spacings))
_CHOICES = {"sampler": tuple(SAMPLERS), "spacing": _SPACINGS, "detector": DETECTORS}
_TEXTS = ("prompt", "negative_prompt")  # an empty one is a value
# Where a form starts otherwise than a command line, which has a seed and a prompt, and may write thousands of files.
_EVERY: dict[str, Any] = {"prompt": "", "sampler": "ddim", "seed": None, "H": None, "W": None}
_STARTS: dict[str, dict[str, Any]] = {
    "txt2img": {"n_iter": 1},
    "control2img": {"detector": "canny", "control_scale": 1.0},
    "sample_diffusion": {"n_samples": 9},
}


class Task(NamedTuple):
    """A tab of the page: the script that it corresponds to, and the models that it fits."""

    name: str  # of the script, and in the metadata
    title: str
    request: type[Request]
    require: Callable[[ModelInfo], None]  # raises ValueError for models that do not fit


def _require_image_to_image(info: ModelInfo) -> None:
    requests.require_text_model(info, concat_channels=1 if takes_depth(info) else 0)


def takes_depth(info: ModelInfo) -> bool:
    """True for depth-to-image models."""
    return info.takes_text and str(value_at(info.config, "model", "target")).endswith(".LatentDepth2ImageDiffusion")


def has_own_control(info: ModelInfo) -> bool:
    """True for a model with a ControlNet in its checkpoint."""
    return value_at(info.config, "model", "params", "control_stage_config") is not None


TASKS = {
    task.name: task
    for task in (
        Task("txt2img", "Text to image", requests.TextToImageRequest, requests.require_text_model),
        Task("img2img", "Image to image", requests.ImageToImageRequest, _require_image_to_image),
        Task("inpaint", "Inpainting", requests.InpaintRequest, requests.require_inpainting_model),
        Task("control2img", "ControlNet", requests.ControlRequest, requests.require_text_model),
        Task("edit", "Edit", requests.EditRequest, requests.require_edit_model),
        Task("upscale", "Upscale", requests.UpscaleRequest, requests.require_upscaler),
        Task(
            "sample_diffusion",
            "Samples",
            requests.ClassConditionalRequest,
            requests.require_unconditional_or_class,
        ),
    )
}


@dataclass(frozen=True)
class Field:
    """A setting of a form: a flag of the script that is a field of the request."""

    name: str  # of the parsed argument
    key: str  # of the request and in the metadata
    flag: str
    label: str
    kind: type  # bool, int, float or str
    count: int | None  # of the values of a flag that takes several
    repeated: bool  # the flag is given once for each ControlNet
    default: Any
    help: str
    choices: tuple[str, ...]

    @property
    def main(self) -> bool:
        return self.name in _MAIN

    def parse(self, value: Any) -> Any:
        """The value as the script's parser gives it; None for a blank. Raises ValueError with the flag."""
        if self.repeated:
            parsed = map(self._parse_one, value if isinstance(value, list) else [value])
            return [self.default if one is None else one for one in parsed]
        return self._parse_one(value)

    def _parse_one(self, value: Any) -> Any:
        if value is None or (isinstance(value, str) and not value.strip() and self.name not in _TEXTS):
            return None
        try:
            if self.count is not None:
                return [self.kind(word) for word in str(value).split()]
            if self.kind is int and int(value) != float(value):
                raise ValueError("a fraction")
            return self.kind(value)
        except (TypeError, ValueError, OverflowError) as error:
            kind = "whole number" if self.kind is int else "number"
            wanted = f"a {kind}" if self.count is None else f"{self.count} {kind}s"
            raise ValueError(f"{self.flag} {value}: expected {wanted}") from error

    def shown(self, value: Any) -> Any:
        """The form's value for a parsed one; a list for a flag that is given once for each ControlNet."""
        return " ".join(map(str, value)) if self.count is not None else value


class Form:
    """The settings of a task, and what a filled form asks for."""

    def __init__(self, task: Task, parser: Parser, fixed: Mapping[str, Any] | None = None) -> None:
        """fixed: flags that are the server's."""
        self.task, self.parser, self.fixed = task, parser, fixed or {}
        known = {field.name for field in fields(task.request)}
        actions = [action for action in parser._actions if action.dest not in _HIDDEN]
        found = [_field(action, task.name) for action in actions if _key(action) in known]
        order = {name: k for k, name in enumerate(_MAIN)}
        self.fields = sorted(found, key=lambda field: order.get(field.name, len(order)))

    def options(self, values: Mapping[str, Any]) -> Namespace:
        """The flags of the script, as typed in the form; a blank seed is random, other blanks are the flag's default.

        Raises ValueError for a value of another type.
        """
        opt = self.parser.parse_args([])
        vars(opt).update(self.fixed)
        given = set()
        for field in self.fields:
            value = field.parse(values.get(field.name))
            if value is None and field.name == "seed":
                value = secrets.randbelow(MAX_SEED + 1)
            if value is not None:
                setattr(opt, field.name, value)
                given.add(field.name)
        opt.given = frozenset(given)
        return opt

    def recorded(self, path: str, info: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the fields for an image with this metadata. Raises ValueError if they are invalid."""
        if info.get("class") is not None:
            info = {**info, "classes": str(info["class"])}
        check_types(path, info, self.parser, {field.key: field.name for field in self.fields})
        return {field.name: field.shown(info[field.key]) for field in self.fields if field.key in info}


def _key(action: argparse.Action) -> str:
    return cli.RENAMED.get(action.dest, action.dest)


def _label(name: str, task: str) -> str:
    if (task, name) == ("sample_diffusion", "n_samples"):  # the number of images; in other scripts that of a batch
        return "Images"
    text = _LABELS.get(name, name.removeprefix("ddim_").removeprefix("custom_").replace("_", " "))
    return text[0].upper() + text[1:]


def _field(action: argparse.Action, task: str) -> Field:
    numbers: dict[Any, type] = {int: int, float: float, parse_batch_size: int}
    kind: Any = bool if action.nargs == 0 else numbers.get(action.type, str)
    count = action.nargs if isinstance(action.nargs, int) and action.nargs > 1 else None
    repeated = isinstance(action.default, list) and count is None
    starts = {**_EVERY, **_STARTS.get(task, {})}
    choices = tuple(_CHOICES.get(action.dest, action.choices or ()))
    names = action.dest, _key(action), action.option_strings[-1], _label(action.dest, task)
    field = Field(*names, kind, count, repeated, None, action.help or "", choices)
    return replace(field, default=field.shown(starts.get(action.dest, action.default)))


def supported(info: ModelInfo, controlnets: bool) -> dict[str, str]:
    """Every task -> '' if the model can do it, else the reason, in the script's words."""
    reasons = {}
    for task in TASKS.values():
        try:
            task.require(info)
            reasons[task.name] = ""
        except ValueError as error:
            reasons[task.name] = str(error)
    if not (has_own_control(info) or controlnets or reasons["control2img"]):
        reasons["control2img"] = "no ControlNet is offered here; start the page with --controlnet FILE"
    return reasons


def taken_inputs(info: ModelInfo) -> dict[str, bool]:
    """True for each input that not all models take, if this model takes it."""
    classes, text = info.n_classes is not None, info.takes_text
    taken = {"depth": takes_depth(info), "controlnet": not has_own_control(info)}
    taken |= {"noise_level": info.max_noise_level is not None, "classes": classes, "null_class": classes}
    taken |= {"prompt": text, "negative_prompt": text}
    return taken | dict.fromkeys(("scale", "guidance_rescale", "guidance_interval"), text or classes)


def numbered(name: str, control: int) -> str:
    """Name of an input of one ControlNet: `image`, `image-2`, `image-3`."""
    return name if control == 0 else f"{name}-{control + 1}"


def controls_of(values: Mapping[str, Any], by: Sequence[str] = ("image", "controlnet")) -> dict[int, dict[str, Any]]:
    """The inputs of each ControlNet that has one of `by`, by its place in the form."""
    names = ("image", "controlnet", "detector", "control_scale")
    rows = {k: {name: values.get(numbered(name, k)) for name in names} for k in range(MOST_CONTROLS)}
    return {k: row for k, row in rows.items() if any(row[name] for name in by)}


def check_share(count: int, height: int, width: int) -> None:
    """Raise ValueError for a job that would take the server for itself."""
    if count > MOST_IMAGES:
        raise ValueError(f"{count} images: a job of this page has at most {MOST_IMAGES}; the scripts have no limit")
    if height * width > MOST_PIXELS:
        side = round(MOST_PIXELS**0.5)
        raise ValueError(
            f"{width}x{height} pixels: an image of this page has at most {side}x{side}; the scripts have no limit"
        )


def parse_classes(text: str | None, names: Sequence[str]) -> tuple[int, ...] | None:
    """Classes as typed in the form: numbers, ranges and names, separated by commas; None if blank."""
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    return inference.parse_classes(words, names) if words else None
