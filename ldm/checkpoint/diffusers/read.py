"""A diffusers folder as weights under their published names, from its own configs only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint.diffusers import plan, text
from ldm.checkpoint.diffusers.controlnet import CONTROLNET, ControlNetLayout
from ldm.checkpoint.diffusers.files import is_model_folder, read_component, read_json
from ldm.checkpoint.diffusers.first_stage import StageLayout
from ldm.checkpoint.diffusers.plan import Layout, Plan
from ldm.checkpoint.diffusers.rules import ConversionError, first_difference, to_ours
from ldm.checkpoint.diffusers.scheduler import check_scheduler
from ldm.checkpoint.diffusers.text import TextLayout
from ldm.checkpoint.diffusers.unet import CROSS, PLAIN, UNetLayout
from ldm.checkpoint.formats import read_tensors

EXTRAS = "published_extras.safetensors"  # tensors of a published file that diffusers has no place for
STAGES = ("vae", "vqvae")
_MAX_COUNT = 64  # levels, blocks, layers


def check_is_model(folder: Path) -> None:
    """Raise ConversionError unless the folder has diffusers' layout."""
    if not is_model_folder(folder):
        if (ckpt := folder / "checkpoints" / "last.ckpt").is_file():
            raise ConversionError(f"{folder}: a run directory; pass its checkpoint, {ckpt}")
        raise ConversionError(
            f"{folder}: not a model in diffusers' layout: it has neither unet/config.json nor a config.json of a UNet, "
            "first stage or ControlNet; a run directory has configs/*-project.yaml and checkpoints/"
        )


def component_layouts(folder: Path, text_kind: str | None = None) -> dict[str, Layout]:
    """The layout of each component of the folder, by subfolder; "" for a folder that is one component."""
    check_is_model(folder)
    if not (folder / "unet" / "config.json").is_file():
        path = folder / "config.json"
        alone: dict[str, Callable[[dict[str, Any]], Layout]] = {CROSS: UNetLayout.from_config}
        alone |= {PLAIN: UNetLayout.from_config, CONTROLNET: ControlNetLayout.from_config}
        return {"": _layout(path, alone.get(read_json(path)["_class_name"], StageLayout.from_config))}
    makers: dict[str, Callable[[dict[str, Any]], Layout]] = {"unet": UNetLayout.from_config}
    makers |= dict.fromkeys(STAGES, StageLayout.from_config)
    makers["text_encoder"] = lambda config: TextLayout.from_config(config, text_kind)
    paths = {name: folder / name / "config.json" for name in makers}
    return {name: _layout(path, makers[name]) for name, path in paths.items() if path.is_file()}


def _layout(path: Path, make: Callable[[dict[str, Any]], Layout]) -> Layout:
    config = read_json(path)
    counts = [config.get(name) for name in ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers")]
    counts += [len(value) for value in config.values() if isinstance(value, list)]
    flat = [n for count in counts for n in (count if isinstance(count, list) else [count])]
    if any(isinstance(n, list) or (isinstance(n, int) and not 0 <= n <= _MAX_COUNT) for n in flat):
        raise ConversionError(f"{path}: implausible layer counts (negative or over {_MAX_COUNT})")
    try:
        return make(config)
    except KeyError as error:
        raise ConversionError(f"{path}: missing key {error}") from error
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConversionError(f"{path}: invalid value ({error})") from error


def prefix_of(name: str, layout: Layout) -> str:
    """Prefix of a component's tensors in a published file."""
    if isinstance(layout, UNetLayout):
        return plan.UNET
    if isinstance(layout, TextLayout):
        return text.PREFIX[layout.kind]
    if isinstance(layout, ControlNetLayout):
        return plan.CONTROL
    return plan.STAGE if name else ""


def read_folder(folder: Path, text_kind: str | None = None) -> dict[str, Tensor]:
    """The tensors of a diffusers folder under their published names, memory-mapped.

    text_kind: the text encoder's kind, see `ldm.checkpoint.diffusers.text`; None tells it by the activation. Folders of
    others lack OpenCLIP's unused tensors, which `FrozenOpenCLIPEmbedder.ensure_weights` makes.
    """
    weights: dict[str, Tensor] = {}
    for name, layout in component_layouts(folder, text_kind).items():
        tensors = to_ours(layout.rules(), read_component(folder / name), str(folder / name))
        weights |= {prefix_of(name, layout) + key: tensor for key, tensor in tensors.items()}
    for name in (plan.CLASS_FILE, plan.CONDITION_FILE):
        if (folder / name).is_file():
            weights |= {plan.CONDITION + key: tensor for key, tensor in read_tensors(folder / name).items()}
    if (folder / EXTRAS).is_file():
        weights = read_tensors(folder / EXTRAS) | weights
    return weights


def check_folder(folder: Path, wanted: Plan) -> None:
    """Raise ConversionError if the folder's components or noise schedule differ from the YAML's."""
    layouts = component_layouts(folder, wanted.text.kind if wanted.text else None)
    for part in wanted.components:
        same_type = [(name, layout) for name, layout in layouts.items() if type(layout) is type(part.layout)]
        if not same_type:
            raise ConversionError(f"{folder}: has no {part.name}, which the YAML requires")
        name, layout = same_type[0]
        if difference := first_difference(part.layout, layout):
            path = folder / name / "config.json"
            raise ConversionError(f"{path}: {difference}; does this YAML belong to the folder?")
    if wanted.scheduler is None:
        return
    if (folder / "scheduler" / "scheduler_config.json").is_file():
        check_scheduler(wanted.params, read_json(folder / "scheduler" / "scheduler_config.json"))
    scale = scale_factor_of(folder)
    if scale is not None and wanted.scale_factor is not None and abs(scale / wanted.scale_factor - 1) > 1e-3:
        raise ConversionError(
            f"{folder}: the first stage's scaling_factor is {scale:g}, but {wanted.scale_factor:g} in the YAML"
        )


def scale_factor_of(folder: Path) -> float | None:
    """The latents' scale factor in the first stage's config.json; None if it gives none."""
    paths = [folder / name / "config.json" for name in STAGES]
    value = next((read_json(path).get("scaling_factor") for path in paths if path.is_file()), None)
    return None if value is None else float(value)
