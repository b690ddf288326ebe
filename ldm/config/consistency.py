"""Keys of a training config that must change together: channels, widths, sizes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from ldm.config.instantiate import FIRST_STAGE_AS_CONDITION, UNCONDITIONAL, ConfigError, resolve_alias, value_at
from ldm.config.signature import constructor_arguments
from ldm.config.text_shapes import OPEN_CLIP_ARCH, OPEN_CLIP_SHAPES, VIT_L_14

logger = logging.getLogger(__name__)

HINT_BLOCK_CHANNELS = (16, 32, 96, 256)  # of a ControlNet's hint convolutions, as published
ADAPTERS = ("adapters", "token_embeddings")  # sections of a LatentDiffusion whose checkpoints lack the base weights
LOSS_MASK = "loss_mask"  # the masks of ImageFolder, in the batch
_LATENT_MODELS = "ldm.models.diffusion."
_UNET = (
    "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "ldm.models.diffusion.controlnet.ControlledUnetModel",
)
_CONTROLNET = "ldm.models.diffusion.controlnet.ControlNet"
_COPIED = "in_channels model_channels num_res_blocks channel_mult attention_resolutions context_dim"  # by a ControlNet
_AUTOENCODERS = "ldm.models.autoencoder."
_GROUPS = 32  # of a group norm, if norm_num_groups is not set
_ENCODER_WIDTH = {  # of the vectors that an encoder returns, by its parameter
    "ClassEmbedder": "embed_dim",
    "BERTEmbedder": "n_embed",
    "TransformerEmbedder": "n_embed",
    "CaptionEmbedder": "n_embed",
}


def check_consistency(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first of `consistency_problems`."""
    for problem in consistency_problems(config):
        raise ConfigError(problem)


def consistency_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for every two keys of a training config that exclude each other, with both paths and values.

    Logs a warning for sizes that differ although training works with them. Networks of other packages are not checked.
    """
    model = config["model"]
    params, target = model.get("params") or {}, resolve_alias(str(model.get("target")))
    latent = "first_stage_config" in params
    stage = "model.params.first_stage_config.params" if latent else "model.params"
    ddconfig = _own_params(params["first_stage_config"] if latent else model, _AUTOENCODERS).get("ddconfig") or {}
    unet = _own_params(params.get("unet_config"), _UNET)
    yield from _channel_problems(target, params, f"{stage}.ddconfig", ddconfig, unet)
    levels = ddconfig.get("ch_mult")
    yield from _control_problems(_own_params(params.get("control_stage_config"), _CONTROLNET), unet, levels)
    sections = [name for name in ADAPTERS if params.get(name) is not None]
    for name in ("cond_stage_trainable", "learn_logvar") if sections else ():
        if params.get(name):
            advice = "; targets of adapters may have text_encoder" if name == "cond_stage_trainable" else ""
            base = f"model.params.{sections[0]} trains on a frozen base"
            yield f"model.params.{name} true: {base}; set it to false{advice}"
    yield from _mask_problems(params, config.get("data") or {})
    sizes = dict(_data_sizes(config.get("data") or {}))
    if not latent:
        _compare_sizes("model.params.ddconfig.resolution", ddconfig.get("resolution"), 1, sizes)
    elif levels:
        _compare_sizes("model.params.image_size", params.get("image_size"), 2 ** (len(levels) - 1), sizes)
    _check_attention(unet, ddconfig, stage)
    factors = pixel_factors(model)
    side, cells = params.get("image_size"), factors[1]
    if isinstance(side, int) and side % cells:
        path = "model.params.unet_config.params.channel_mult"
        yield f"model.params.image_size {side}: expected a multiple of {cells}, for {path} {list(unet['channel_mult'])}"
    place = "data.params.train.params.buckets"
    if isinstance(buckets := value_at(config, *place.split(".")), Mapping):  # then all sides are multiples of `step`
        sizes = {f"{place}.step": step} if isinstance(step := buckets.get("step"), int) else {}
    for path, size in sizes.items():
        yield from size_problems(path, (size, size), factors)


def pixel_factors(model: Mapping[str, Any]) -> tuple[int, int]:
    """Return the factors by which the first stage and the UNet of a config's model shrink an image; 1 if unknown."""
    params = model.get("params") or {}
    ddconfig = _own_params(params.get("first_stage_config", model), _AUTOENCODERS).get("ddconfig")
    unet = _own_params(params.get("unet_config"), _UNET)
    first, second = (2 ** (len(each or [0]) - 1) for each in (value_at(ddconfig, "ch_mult"), unet.get("channel_mult")))
    return first, second


def _mask_problems(params: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for a masked loss without masks in the data; log masks that the loss does not use."""
    wanted = params.get("loss_mask_key")
    for split in ("train", "validation"):
        dataset = value_at(data, "params", split)
        place, masks = f"data.params.{split}.params.masks", value_at(dataset, "params", "masks")
        takes_masks = "masks" in (constructor_arguments(str(value_at(dataset, "target"))) or ())
        if wanted == LOSS_MASK and takes_masks and masks is None:
            yield f"model.params.loss_mask_key {wanted}: set {place} to a folder of masks, or remove the key"
        if masks is not None and wanted is None:
            text = "%-11s %s has no effect: set model.params.loss_mask_key=%s for a masked loss"
            logger.warning(text, "config", place, LOSS_MASK)


def size_problems(path: str, size: tuple[int, int], factors: tuple[int, int]) -> Iterator[str]:
    """Yield a line unless height and width of the images are multiples of the product of `factors`.

    path: of the size in the YAML. factors: by which the first stage and the UNet shrink an image; 1 for a missing one.
    """
    multiple = factors[0] * factors[1]
    if not any(side % multiple for side in size):
        return
    below = [max(multiple, side // multiple * multiple) for side in size]
    above = [-(-side // multiple) * multiple for side in size]
    nearest = " or ".join(dict.fromkeys(f"{height}x{width}" for height, width in (below, above)))
    yield (
        f"{path}: images of {size[0]}x{size[1]} pixels (height x width); this model needs multiples of {multiple} "
        f"(first stage {factors[0]} x UNet {factors[1]}), the nearest are {nearest}"
    )


def _own_params(node: Any, prefix: str | tuple[str, ...]) -> Mapping[str, Any]:
    """Return the params of a node if its target begins with `prefix` (or one of them), else {}: others' are unknown."""
    own = resolve_alias(str(value_at(node, "target"))).startswith(prefix)
    return (value_at(node, "params") or {}) if own else {}


def _channel_problems(
    target: str, params: Mapping[str, Any], dd_path: str, ddconfig: Mapping[str, Any], unet: Mapping[str, Any]
) -> Iterator[str]:
    """Yield what cannot work between the first stage, the UNet and the condition's encoder."""
    first, cond = params.get("first_stage_config"), params.get("cond_stage_config")
    yield from _group_problems(dd_path, "ch", "ch_mult", ddconfig)
    loss = value_at(params, "lossconfig", "params") or {}
    seen, out = loss.get("disc_in_channels", 3), ddconfig.get("out_ch", 3)
    if ddconfig and "disc_start" in loss and not loss.get("disc_conditional") and seen != out:
        yield f"model.params.lossconfig.params.disc_in_channels {seen}: {dd_path}.out_ch is {out}; they must be equal"
    path = "model.params.unet_config.params"
    yield from _group_problems(path, "model_channels", "channel_mult", unet)
    if not target.startswith(_LATENT_MODELS) or not unet:
        return
    channels, sees, returns = params.get("channels", 3), unet.get("in_channels"), unet.get("out_channels")
    latent = f"model.params.channels is {channels}"
    embed_dim = _own_params(first, _AUTOENCODERS).get("embed_dim")
    if embed_dim not in (None, channels):
        yield f"model.params.first_stage_config.params.embed_dim {embed_dim}: {latent}; they must be equal"
    if unet.get("n_embed") is None and returns not in (None, channels):
        yield f"{path}.out_channels {returns}: {latent}; they must be equal"
    key = _conditioning_key(params)
    concat = key in ("concat", "hybrid", "hybrid-adm")
    alone = key in (None, "crossattn", "adm", "crossattn-adm")  # a key of another package may add channels
    if sees is not None and alone and sees != channels:
        yield f"{path}.in_channels {sees}: {latent}; they must be equal with conditioning_key {key}"
    width = _concat_width(params, cond) if key == "concat" else None
    if sees is not None and concat and (sees <= channels or width not in (None, sees - channels)):
        more = f"{width} channels" if width is not None else "the channels"
        yield f"{path}.in_channels {sees}: {latent}; conditioning_key {key} adds {more} of the condition to them"
    attends, given = unet.get("context_dim"), _encoder_width(cond)
    if key in ("crossattn", "hybrid", "hybrid-adm") and isinstance(attends, int) and given not in (None, attends):
        yield (
            f"{path}.context_dim {attends}: model.params.cond_stage_config "
            f"({str(value_at(cond, 'target')).rpartition('.')[2]}) returns vectors of width {given}; they must be equal"
        )


def _group_problems(path: str, width: str, multipliers: str, params: Mapping[str, Any]) -> Iterator[str]:
    groups = params.get("norm_num_groups", _GROUPS)
    for mult in params.get(multipliers) or ():
        channels = mult * params.get(width, groups)
        if channels % groups:
            yield (
                f"{path}.{width} {params[width]}: with {path}.{multipliers} {list(params[multipliers])} a level has "
                f"{channels} channels; they must be multiples of {groups}, the groups of group norm"
            )


def _control_problems(control: Mapping[str, Any], unet: Mapping[str, Any], levels: Any) -> Iterator[str]:
    """Yield what cannot work between a ControlNet, its UNet and the first stage, whose `ch_mult` is `levels`."""
    path, other = "model.params.control_stage_config.params", "model.params.unet_config.params"
    for name in _COPIED.split():
        ours, theirs = control.get(name), unet.get(name)
        if None not in (ours, theirs) and ours != theirs:
            yield f"{path}.{name} {ours}: {other}.{name} is {theirs}; they must be equal"
    widths = control.get("hint_block_channels") or HINT_BLOCK_CHANNELS
    if control and levels and len(widths) != len(levels):
        yield (
            f"{path}.hint_block_channels {list(widths)}: expected {len(levels)} numbers, one for each level of the "
            f"first stage (ch_mult {list(levels)})"
        )


def _conditioning_key(params: Mapping[str, Any]) -> str | None:
    if params.get("cond_stage_config") == UNCONDITIONAL or "cond_stage_config" not in params:
        return None
    return params.get("conditioning_key") or ("concat" if params.get("concat_mode", True) else "crossattn")


def _concat_width(params: Mapping[str, Any], cond: Any) -> int | None:
    """Return the channels of a concat condition; None if the config does not determine it."""
    if params.get("concat_keys"):
        return None
    if cond == FIRST_STAGE_AS_CONDITION:
        return value_at(params, "first_stage_config", "params", "embed_dim")
    if str(value_at(cond, "target")).endswith(".SpatialRescaler"):
        given = value_at(cond, "params") or {}
        return given.get("out_channels") or given.get("in_channels", 3)
    return None


def _encoder_width(cond: Any) -> int | None:
    """Return the width of an encoder's vectors; None if the config does not determine it."""
    name, given = str(value_at(cond, "target")).rpartition(".")[2], value_at(cond, "params") or {}
    if name in _ENCODER_WIDTH:
        return given.get(_ENCODER_WIDTH[name])
    if name == "FrozenCLIPEmbedder" and "version" not in given:
        return value_at(given, "text_config", "hidden_size") or VIT_L_14["hidden_size"]
    if name == "FrozenOpenCLIPEmbedder":
        shape = OPEN_CLIP_SHAPES.get(given.get("arch", OPEN_CLIP_ARCH), {})
        return value_at(given, "text_config", "width") or shape.get("width")
    return None


def _data_sizes(data: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the path and the value of the training images' side, where the YAML states one number."""
    train = value_at(data, "params", "train")
    target, params = resolve_alias(str(value_at(train, "target"))), value_at(train, "params") or {}
    crops = target.startswith("ldm.data.openimages.")  # by a default of the class
    name = "crop_size" if params.get("crop_size") or crops else "size"
    if target.startswith("ldm.data.") and isinstance(params.get(name), int):
        yield f"data.params.train.params.{name}", params[name]


def _compare_sizes(path: str, value: Any, factor: int, sizes: Mapping[str, int]) -> None:
    for place, size in sizes.items():
        if isinstance(value, int) and value * factor != size and size % factor == 0:
            cells = f" (latent cells of {factor} pixels)" if factor > 1 else ""
            logger.warning(
                "%-11s %s %d%s: %s is %d; with images of this size set %s=%d",
                *("config", path, value, cells, place, size, path, size // factor),
            )


def _check_attention(unet: Mapping[str, Any], ddconfig: Mapping[str, Any], stage: str) -> None:
    """Log a warning for attention at levels that do not exist: a published config has some."""
    side = ddconfig.get("resolution")
    occurring = {
        "model.params.unet_config.params.attention_resolutions": (
            unet.get("attention_resolutions"),
            [2**level for level in range(len(unet.get("channel_mult") or (1, 2, 4, 8)))],
        ),
        f"{stage}.ddconfig.attn_resolutions": (
            ddconfig.get("attn_resolutions"),
            [side // 2**level for level in range(len(ddconfig.get("ch_mult") or ()))] if isinstance(side, int) else [],
        ),
    }
    for path, (given, levels) in occurring.items():
        never = [each for each in given or () if each not in levels]
        if never and levels:
            words = ", ".join(map(str, levels))
            logger.warning("%-11s %s %s: never occurs; the levels are %s", "config", path, never, words)
