"""Facts of a model that its YAML states; flags are checked against them before anything is built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config.instantiate import value_at
from ldm.paths import in_checkout

if TYPE_CHECKING:
    from omegaconf import DictConfig

SAFETY_MODES = ("on", "off", "report")  # what happens to images that the safety checker flags, see ldm.output.safety
DETECTORS = ("none", "canny", "depth")  # that make a ControlNet's hints, see ldm.data.detectors
CANNY = (100, 200)  # thresholds of the Canny detector, as published
_PUBLISHED = (  # configs of text-conditional models, which the published scripts sample at one size, not at their own
    "configs/stable-diffusion/",
    "configs/latent-diffusion/",
    "configs/retrieval-augmented-diffusion/",
    "models/ldm/text2img256/",
)
_NOT_TEXT = ("__is_unconditional__", "__is_first_stage__", "ClassEmbedder", "SpatialRescaler", "Identity")


@dataclass(frozen=True)
class ModelInfo:
    """Facts of a model that its YAML states, and the config itself."""

    timesteps: int  # length of the noise schedule, the maximum number of sampling steps
    channels: int  # of a latent
    factor: int | None  # pixels per latent cell; None if the first stage's config does not state it
    latent_multiple: int  # latent height and width must be multiples of this (the UNet's downsampling)
    use_ema: bool
    condition: str | None  # dotted class name of the condition stage, or a published word such as __is_first_stage__
    conditioning_key: str | None
    takes_tokens: bool  # the condition stage takes token ids (e.g. bounding boxes), not text
    image_size: tuple[int, int]  # height and width of the training latents
    unet_channels: int | None  # input channels of the network: the latent's and those of concat conditioning
    context_dim: int | None  # width of the vectors that the network attends to
    n_classes: int | None  # of a class-conditional model, a "no class" entry included; else None
    null_class: int | None  # the class that means "no class"; None if the model was trained without one
    zero_terminal_snr: bool  # no signal is left at the last timestep
    safety: str  # default of --safety, one of SAFETY_MODES
    max_noise_level: int | None  # of a text-conditional upscaler: the strongest noise on its low-resolution image
    config: Mapping[str, Any] = field(repr=False, compare=False)  # has the key `model`
    path: Path | None = None  # the YAML; the last one if several were merged

    @property
    def condition_name(self) -> str:
        """Class name of the condition stage; `__is_unconditional__` without one."""
        return (self.condition or "__is_unconditional__").rpartition(".")[2]

    @property
    def unet_name(self) -> str:
        """Class name of the denoising network."""
        return str(value_at(self.config, "model", "params", "unet_config", "target")).rpartition(".")[2]

    @property
    def takes_text(self) -> bool:
        return self.condition_name not in _NOT_TEXT and not self.takes_tokens

    @property
    def image_rescaling(self) -> float | None:
        """Factor by which a SpatialRescaler scales the image that conditions the network; None for other conditions."""
        if self.condition_name != "SpatialRescaler":
            return None
        params = value_at(self.config, "model", "params", "cond_stage_config", "params") or {}
        channels = params.get("in_channels", 3), params.get("out_channels") or 3
        of_images = channels == (3, 3)  # not segmentation maps
        return float(params.get("multiplier", 0.5)) ** int(params.get("n_stages", 1)) if of_images else None

    @property
    def concat_channels(self) -> int:
        """Input channels of the network for concat conditioning."""
        return (self.unet_channels or self.channels) - self.channels

    @property
    def own_size(self) -> tuple[int, int] | None:
        """Height and width of the training latents; None for published models and if the config does not state it."""
        published = self.path is not None and in_checkout(self.path.resolve()).startswith(_PUBLISHED)
        # InstructPix2Pix' own YAMLs state 16 and 32, and it is sampled at 512x512 pixels.
        published |= str(value_at(self.config, "model", "target")).endswith(".ddpm_edit.LatentDiffusion")
        stated = value_at(self.config, "model", "params", "image_size") is not None
        return self.image_size if stated and not published else None

    @property
    def multiple(self) -> int:
        """Image height and width must be multiples of this many pixels (of latent cells if the factor is unknown)."""
        return (self.factor or 1) * self.latent_multiple


def read_model_info(path: str | Path | Sequence[Path], overrides: Iterable[str] = ()) -> ModelInfo:
    """`model_info` of a YAML file, see `read_config`. Raises ValueError for that of a first stage."""
    files = [path] if isinstance(path, (str, Path)) else list(path)
    config = read_config(files, overrides)
    params = config.model.get("params") or {}
    if "ddconfig" in params and "unet_config" not in params:
        name = str(config.model.target).rpartition(".")[2]
        raise ValueError(f"{files[-1]}: {name} is a first stage; choose the run or config of a diffusion model")
    return model_info(config, Path(files[-1]))


def read_config(path: str | Path | Sequence[str | Path], overrides: Iterable[str] = ()) -> DictConfig:
    """Read the section `model` of a YAML, and its key `safety`; raise ValueError or FileNotFoundError if that fails.

    Several files are merged left to right, then the overrides `model.params.key=value`, whose paths are checked.
    """
    from ldm.config.merge import read_model  # omegaconf stays out of --help

    files = [Path(path)] if isinstance(path, (str, Path)) else [Path(file) for file in path]
    return read_model(files, list(overrides))


def model_info(config: Mapping[str, Any], path: Path | None = None) -> ModelInfo:
    """Facts of the model that `config` (with its key `model`) describes; nothing is imported or built."""
    params = config["model"].get("params") or {}
    condition = params.get("cond_stage_config")
    n_classes = null_class = None
    if isinstance(condition, Mapping) and str(condition.get("target")).endswith(".ClassEmbedder"):
        n_classes = int(value_at(condition, "params", "n_classes") or 1000)
        # 1001 classes for ImageNet's 1000 as published; otherwise cond_dropout says that there is a null class.
        null_class = n_classes - 1 if n_classes == 1001 or params.get("cond_dropout") else None
    size = params.get("image_size", 256)
    unet = value_at(params, "unet_config", "params") or {}
    low_scale = params.get("low_scale_config")
    return ModelInfo(
        timesteps=int(params.get("timesteps", 1000)),
        channels=int(params.get("channels", 3)),
        factor=_factor(params.get("first_stage_config")),
        latent_multiple=2 ** (len(unet.get("channel_mult") or (1, 2, 4, 8)) - 1),
        use_ema=bool(params.get("use_ema", True)),
        condition=condition.get("target") if isinstance(condition, Mapping) else condition,
        conditioning_key=params.get("conditioning_key"),
        takes_tokens=value_at(condition, "params", "use_tokenizer") is False,
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        unet_channels=unet.get("in_channels"),
        context_dim=unet.get("context_dim"),
        n_classes=n_classes,
        null_class=null_class,
        zero_terminal_snr=bool(params.get("zero_terminal_snr", False)),
        safety=_safety(config, path),
        max_noise_level=None if low_scale is None else int(value_at(low_scale, "params", "max_noise_level") or 1000),
        config=config,
        path=path,
    )


def _factor(first_stage: Any) -> int | None:
    if not isinstance(first_stage, Mapping) or str(first_stage.get("target")).endswith("IdentityFirstStage"):
        return 1  # diffusion in pixel space
    levels = value_at(first_stage, "params", "ddconfig", "ch_mult")
    return None if levels is None else 2 ** (len(levels) - 1)


def _safety(config: Mapping[str, Any], path: Path | None) -> str:
    """The config's `safety`; by default `on` for models with a CLIP text encoder, as Stable Diffusion's.

    A run of main.py that started without other weights (`ckpt_path`, `resume_from_checkpoint`) is no fine-tune of
    Stable Diffusion: `off`.
    """
    if "safety" in config:
        mode = config["safety"]
        if isinstance(mode, bool):  # YAML reads on and off as booleans
            mode = "on" if mode else "off"
        if mode not in SAFETY_MODES:
            raise ValueError(f"config: safety: {mode}: choose one of {', '.join(SAFETY_MODES)}")
        return mode
    params = config["model"].get("params") or {}
    own_run = path is not None and path.name.endswith("-project.yaml")
    if path is not None and own_run and not params.get("ckpt_path") and not _starts_from_checkpoint(path):
        return "off"
    target = str(value_at(params, "cond_stage_config", "target"))
    return "on" if target.endswith((".FrozenCLIPEmbedder", ".FrozenOpenCLIPEmbedder")) else "off"


def _starts_from_checkpoint(project: Path) -> bool:
    """True if a run of main.py, by its saved config, started from the full state of another one."""
    from ldm.config.files import load_yaml  # omegaconf stays out of --help

    lightning = project.with_name(project.name.replace("-project.yaml", "-lightning.yaml"))
    saved: Any = load_yaml(lightning) if lightning.is_file() else {}
    return bool(value_at(saved, "lightning", "trainer", "resume_from_checkpoint"))
