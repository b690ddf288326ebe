"""A diffusers folder as weights under their published names, from its own configs alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ldm.checkpoint.diffusers import plan, text
from ldm.checkpoint.diffusers.files import is_diffusers_folder, read_component, read_json
from ldm.checkpoint.diffusers.first_stage import KL, VQ, StageLayout
from ldm.checkpoint.diffusers.plan import Layout, Plan
from ldm.checkpoint.diffusers.rules import InterchangeError, first_difference, to_ours
from ldm.checkpoint.diffusers.scheduler import check_scheduler
from ldm.checkpoint.diffusers.text import TextLayout
from ldm.checkpoint.diffusers.unet import CROSS, PLAIN, UNetLayout

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

EXTRAS = "published_extras.safetensors"  # what a file holds and diffusers has no place for
STAGES = ("vae", "vqvae")
_MOST = 64  # levels, blocks, layers: a folder that says more is no model
T = TypeVar("T")


def component_layouts(folder: Path, text_kind: str | None = None) -> dict[str, Layout]:
    """The layout of each component that the folder holds, by its subfolder; "" for a folder that is one component."""
    if not is_diffusers_folder(folder):
        raise InterchangeError(
            f"{folder}: a folder, and no model in diffusers' layout: it has neither unet/config.json nor the config.json of a UNet or "
            f"first stage"
        )
    if not (folder / "unet" / "config.json").is_file():
        config = read_json(folder / "config.json")
        unet = config["_class_name"] in (CROSS, PLAIN)
        return {"": _layout(folder / "config.json", UNetLayout.from_config if unet else StageLayout.from_config)}
    layouts: dict[str, Layout] = {"unet": _layout(folder / "unet" / "config.json", UNetLayout.from_config)}
    for name in STAGES:
        if (folder / name / "config.json").is_file():
            layouts[name] = _layout(folder / name / "config.json", StageLayout.from_config)
    if (folder / "text_encoder" / "config.json").is_file():
        path = folder / "text_encoder" / "config.json"
        layouts["text_encoder"] = _layout(path, lambda config: TextLayout.from_config(config, text_kind))
    return layouts


def _layout(path: Path, make: Callable[[dict[str, Any]], T]) -> T:
    config = read_json(path)
    counts = [config.get(name) for name in ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers")]
    counts += [len(value) for value in config.values() if isinstance(value, list)]
    flat = [n for count in counts for n in (count if isinstance(count, list) else [count])]
    if any(isinstance(n, list) or (isinstance(n, int) and not 0 <= n <= _MOST) for n in flat):
        raise InterchangeError(f"{path}: numbers of no model (more than {_MOST} levels or layers, or less than none)")
    try:
        return make(config)
    except KeyError as error:
        raise InterchangeError(f"{path}: lacks {error}") from error
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise InterchangeError(f"{path}: a value of the wrong kind ({error})") from error


def prefix_of(name: str, layout: Layout) -> str:
    """Where a component's tensors are in a published file."""
    if isinstance(layout, UNetLayout):
        return plan.UNET
    if isinstance(layout, TextLayout):
        return text.PREFIX[layout.kind]
    return plan.STAGE if name else ""


def read_folder(folder: Path, text_kind: str | None = None, stand_ins: bool = True) -> dict[str, Tensor]:
    """The tensors of a diffusers folder under their published names, memory-mapped.

    text_kind: which tower of `text` the text encoder is; None tells by its activation.
    stand_ins: fill what an OpenCLIP file holds and a folder lacks, because nothing uses it, with NaN: a use would show.
    """
    from ldm.checkpoint.formats import existing_file, read_tensors

    weights: dict[str, Tensor] = {}
    layouts = component_layouts(folder, text_kind)
    for name, layout in layouts.items():
        tensors = to_ours(layout.rules(), read_component(folder / name), str(folder / name))
        weights |= {prefix_of(name, layout) + key: tensor for key, tensor in tensors.items()}
    for name in (plan.CLASS_FILE, plan.CONDITION_FILE):
        if (folder / name).is_file():
            weights |= {
                plan.CONDITION + key: tensor for key, tensor in read_tensors(existing_file(folder / name)).items()
            }
    if (folder / EXTRAS).is_file():
        weights |= {
            key: tensor for key, tensor in read_tensors(existing_file(folder / EXTRAS)).items() if key not in weights
        }
    if stand_ins:
        _stand_in(weights, layouts.get("text_encoder"))
    return weights


def _stand_in(weights: dict[str, Tensor], layout: Layout | None) -> None:
    if not isinstance(layout, TextLayout):
        return
    import torch

    prefix = text.PREFIX[layout.kind]
    absent = {name: shape for name, shape in layout.unused_shapes().items() if prefix + name not in weights}
    weights |= {prefix + name: torch.full((), float("nan")).expand(shape) for name, shape in absent.items()}


def check_is_of(folder: Path, config: Mapping[str, Any]) -> None:
    """InterchangeError in one line unless a folder is of the model that a config (with its key `model`) describes."""
    check_folder(folder, plan.plan_of(config))


def check_folder(folder: Path, wanted: Plan) -> dict[str, Layout]:
    """The folder's layouts; InterchangeError in one line where they, or its noise schedule, are not those of the YAML."""
    layouts = component_layouts(folder, wanted.text.kind if wanted.text else None)
    stages = {KL: "an AutoencoderKL", VQ: "a VQModel"}
    for part in wanted.components:
        same_kind = [(name, layout) for name, layout in layouts.items() if type(layout) is type(part.layout)]
        if not same_kind:
            raise InterchangeError(
                f"{folder}: has no {part.folder or stages[part.layout.kind]}, which the YAML asks for"
            )
        name, layout = same_kind[0]
        difference = first_difference(part.layout, layout)
        if difference:
            raise InterchangeError(
                f"{folder / name / 'config.json'}: {difference}; is this the YAML that the folder belongs to?"
            )
    if wanted.scheduler is not None and (folder / "scheduler" / "scheduler_config.json").is_file():
        check_scheduler(wanted.params, read_json(folder / "scheduler" / "scheduler_config.json"))
    _check_scale(folder, wanted)
    return layouts


def scale_factor_of(folder: Path) -> float | None:
    """The scale of the latents that the first stage's config.json gives; None where it gives none."""
    for name in STAGES:
        if (folder / name / "config.json").is_file():
            value = read_json(folder / name / "config.json").get("scaling_factor")
            return None if value is None else float(value)
    return None


def _check_scale(folder: Path, wanted: Plan) -> None:
    found = scale_factor_of(folder) if wanted.scheduler is not None else None
    if found is not None and wanted.scale_factor is not None and abs(found / wanted.scale_factor - 1) > 1e-3:
        raise InterchangeError(
            f"{folder}: the first stage's scaling_factor is {found:g} there and {wanted.scale_factor:g} in the YAML"
        )
