"""What a YAML tells of a model before anything is built: info that settings are checked against, and which script draws with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

SAFETY_MODES = ("on", "off", "report")  # what is done with pictures that the safety checker flags: ldm.output.safety


@dataclass(frozen=True)
class ModelInfo:
    """What can be known of a model from its YAML alone."""

    timesteps: int  # length of the noise schedule, the most steps a sampler can make
    channels: int  # of a latent
    factor: int | None  # pixels per latent cell; None where the first stage's config does not tell
    latent_multiple: int  # height and width of a latent must be multiples of this: the UNet halves them so often
    use_ema: bool
    condition: str | None  # dotted name of the condition stage's class, or one of the two words with underscores
    takes_tokens: bool  # the condition stage is given token ids, e.g. of bounding boxes, and no text
    image_size: tuple[int, int]  # height and width of the latents that the model was trained on
    unet_channels: (
        int | None
    )  # what the network takes: the latent's channels and, where it is concatenated, the condition's
    n_classes: int | None  # of a class-conditional model, "no class" included where it has one; else None
    null_class: int | None  # the class that means "no class", where the model was trained with one
    zero_terminal_snr: bool = False  # no signal is left at the last timestep
    safety: str = "off"  # the default of --safety, one of SAFETY_MODES
    max_noise_level: int | None = (
        None  # of a model that enlarges after a prompt: how much noise the small picture may be given
    )

    @property
    def condition_name(self) -> str:
        """The condition's class without its module; `__is_unconditional__` where there is none."""
        return (self.condition or "__is_unconditional__").rpartition(".")[2]

    @property
    def multiple(self) -> int:
        """Height and width of a picture must be multiples of this, in pixels (with the factor unknown, of a latent)."""
        return (self.factor or 1) * self.latent_multiple


def read_config(path: str | Path | Sequence[Path], overrides: Iterable[str] = ()) -> DictConfig:
    """Read the section `model` of a YAML, and its key `safety`; raise ValueError or FileNotFoundError in one line.

    Several files are merged left to right, then the overrides `model.params.key=value`, whose paths are checked.
    """
    from ldm.config.merge import read_model  # OmegaConf stays out of --help

    return read_model([Path(path)] if isinstance(path, (str, Path)) else list(path), list(overrides))


def model_info(config: Mapping[str, Any]) -> ModelInfo:
    """Facts of the model that `config` (with its key `model`) describes; nothing is imported or built."""
    params = config["model"].get("params") or {}
    first_stage = params.get("first_stage_config")
    factor: int | None = 1  # diffusion in pixel space
    if isinstance(first_stage, Mapping) and not str(first_stage.get("target")).endswith("IdentityFirstStage"):
        levels = value_at(first_stage, "params", "ddconfig", "ch_mult")
        factor = 2 ** (len(levels) - 1) if levels is not None else None
    unet_levels = value_at(params, "unet_config", "params", "channel_mult") or (1, 2, 4, 8)
    condition = params.get("cond_stage_config")
    n_classes = null_class = None
    if isinstance(condition, Mapping) and str(condition.get("target")).endswith(".ClassEmbedder"):
        n_classes = int(value_at(condition, "params", "n_classes") or 1000)
        # Published: 1001 classes of ImageNet's 1000. A model of our own says by its dropout that it has such a class.
        null_class = n_classes - 1 if n_classes == 1001 or params.get("cond_dropout") else None
    size = params.get("image_size", 256)
    return ModelInfo(
        timesteps=int(params.get("timesteps", 1000)),
        channels=int(params.get("channels", 3)),
        factor=factor,
        latent_multiple=2 ** (len(unet_levels) - 1),
        use_ema=bool(params.get("use_ema", True)),
        condition=condition.get("target") if isinstance(condition, Mapping) else condition,
        takes_tokens=value_at(condition, "params", "use_tokenizer") is False,
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        unet_channels=value_at(params, "unet_config", "params", "in_channels"),
        n_classes=n_classes,
        null_class=null_class,
        zero_terminal_snr=bool(params.get("zero_terminal_snr", False)),
        safety=default_safety(config),
        max_noise_level=_max_noise_level(params),
    )


def default_safety(config: Mapping[str, Any]) -> str:
    """What a config says of the safety checker, `safety: on`; without a word, `on` for Stable Diffusion, which CLIP's text makes it."""
    if "safety" in config:
        word = config["safety"]
        if isinstance(word, bool):  # which YAML takes on and off for
            word = "on" if word else "off"
        if word not in SAFETY_MODES:
            raise ValueError(f"config: safety: {word}: choose one of {', '.join(SAFETY_MODES)}")
        return word
    target = value_at(config["model"], "params", "cond_stage_config", "target")
    return "on" if str(target).rpartition(".")[2] in ("FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder") else "off"


def _max_noise_level(params: Mapping[str, Any]) -> int | None:
    if "low_scale_config" not in params:
        return None
    level = value_at(params, "low_scale_config", "params", "max_noise_level")
    return 1000 if level is None else int(level)


def value_at(node: Any, *keys: str) -> Any:
    """The value under nested keys of a config; None where a key is missing."""
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def takes_text(info: ModelInfo) -> bool:
    """Whether the model's condition is a prompt."""
    others = ("__is_unconditional__", "__is_first_stage__", "ClassEmbedder", "SpatialRescaler", "Identity")
    return info.condition_name not in others and not info.takes_tokens


def require_text_model(info: ModelInfo, beside: int = 0) -> None:
    """ValueError where the model's condition cannot be a prompt, or its network needs other channels than `beside` next to the latent."""
    if not takes_text(info):
        name = info.condition_name
        raise ValueError(
            f"this model's condition is no text (cond_stage_config: {name}), so that no prompt can be drawn with it"
        )
    needs = (info.unet_channels or info.channels) - info.channels
    if beside and not needs:
        raise ValueError(
            "--depth: this model sees no depth map; leave it out, or name one that does with --config and --ckpt"
        )
    if needs != beside:
        raise ValueError(
            f"this model needs more than a prompt: it sees {needs} more channels than the latent's; use {script_for(info)}"
        )


def script_for(info: ModelInfo) -> str:
    """The script that draws with a model that is led by a prompt, by how many channels its network sees beside the latent."""
    needs = (info.unet_channels or info.channels) - info.channels
    scripts = {0: "scripts/txt2img.py", 1: "scripts/img2img.py with --depth", 3: "scripts/upscale.py"}
    return (scripts | {info.channels + 1: "scripts/inpaint.py"}).get(needs, "a script of your own over ldm.inference")
