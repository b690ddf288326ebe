"""What the sampling scripts beside txt2img are asked for, checked against the model's YAML before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ldm.inference.settings import (
    ModelInfo,
    SamplerSettings,
    TextToImageRequest,
    check_scale,
    check_seed,
    check_seed_mode,
    check_steps,
    round_to_multiple,
    sampler_eta,
    script_for,
    takes_text,
)

MAX_FEATHER = 512  # pixels


@dataclass(frozen=True)
class ImageToImageRequest(TextToImageRequest):
    """How a picture is drawn anew after a prompt; the defaults are the published img2img's. Height and width are the picture's."""

    scale: float = 5.0
    n_samples: int = 2
    n_iter: int = 1
    strength: float = 0.75  # 0 gives back the picture as the first stage sees it, 1 draws from noise alone

    @property
    def encode_steps(self) -> int:
        """How many of the steps are walked: the published rounding."""
        return int(self.strength * self.steps)

    def checked(self, info: ModelInfo) -> ImageToImageRequest:
        if not 0.0 <= self.strength <= 1.0:
            raise ValueError(
                f"--strength {self.strength}: choose 0 (keep the picture) to 1 (draw from noise alone); 0.75 is usual"
            )
        return super().checked(info)

    def fitted(self, height: int, width: int, info: ModelInfo) -> ImageToImageRequest:
        """The same settings for a picture of that size, brought to the nearest one that the model takes; `--f` where it is given."""
        multiple = (self.factor or info.factor or 1) * info.latent_multiple
        return replace(self, height=round_to_multiple(height, multiple), width=round_to_multiple(width, multiple))


@dataclass(frozen=True)
class ConcatRequest(SamplerSettings):
    """What drawing with a picture beside the latent is asked for, whatever the picture is."""

    steps: int | None = 50
    eta: float | None = None  # None: the sampler's own, 0 for DDIM
    seed: int = 42  # of each picture, so that a picture does not depend on those before it
    prompt: str = ""  # of models that are led by one; others take none
    negative_prompt: str = ""
    scale: float | None = None  # guidance; None: what is usual with a model that is led by a prompt, 1 with others

    def _checked(self, info: ModelInfo, scale: float) -> ConcatRequest:
        """The same settings with the model's own values filled in; `scale` is the usual one of models that are led by a prompt."""
        check_steps("--steps", self.steps, info)
        check_seed(self.seed)
        if info.factor is None:
            raise ValueError(
                "first_stage_config: its ddconfig.ch_mult does not tell how much the first stage shrinks a picture"
            )
        led = takes_text(info)
        usual = scale if led else 1.0
        settings = replace(
            self, eta=sampler_eta(self.sampler, self.eta), scale=usual if self.scale is None else self.scale
        )
        check_scale(settings.scale)
        settings.check_sampler(info, settings.scale)
        asked = {"--prompt": self.prompt, "--negative_prompt": self.negative_prompt, "--scale": settings.scale != 1.0}
        for flag, given in asked.items():
            if given and not led:
                raise ValueError(
                    f"{flag}: no prompt leads this model; leave it out, or name one that is led with --config and --ckpt"
                )
        if self.negative_prompt and settings.scale == 1.0:
            raise ValueError(
                f"--negative_prompt with --scale 1: there is no guidance at 1; choose another scale, {scale:g} is usual"
            )
        return settings


@dataclass(frozen=True)
class InpaintRequest(ConcatRequest):
    """How masked parts of a picture are filled; the defaults are the published ones of the model's family."""

    feather: int = 0  # over how many pixels the drawing fades in from the edge of the hole

    def checked(self, info: ModelInfo) -> InpaintRequest:
        if not 0 <= self.feather <= MAX_FEATHER:
            raise ValueError(f"--feather {self.feather}: choose 0 (a hard edge) to {MAX_FEATHER} pixels")
        return self._checked(info, scale=7.5)


@dataclass(frozen=True)
class UpscaleRequest(ConcatRequest):
    """How a picture is enlarged; the defaults are those that the released models were shown with."""

    steps: int | None = None  # None: 100, and 50 with a model that is led by a prompt
    tile: int = (
        128  # side of a tile in pixels of the small picture; larger pictures are drawn in tiles; 0: always in one piece
    )
    noise_level: int | None = None  # noise that is added to the small picture, for models that are told of it; None: 20

    def checked(self, info: ModelInfo) -> UpscaleRequest:
        """DDIM is as noisy as DDPM unless the model is led by a prompt or another eta is asked for."""
        unit, led, most = info.latent_multiple, takes_text(info), info.max_noise_level
        if self.tile != 0 and (self.tile < 2 * unit or self.tile % unit):
            raise ValueError(
                f"--tile {self.tile}: choose a multiple of {unit} from {2 * unit} on, or 0 for one piece; 128 is usual"
            )
        if self.noise_level is not None and most is None:
            raise ValueError("--noise_level: this model knows no noise in the small picture; leave it out")
        level = min(20, most) if self.noise_level is None and most is not None else self.noise_level
        if level is not None and not 0 <= level <= most:
            raise ValueError(
                f"--noise_level {level}: choose 0 (none) to {most}, the most that this model was trained with; 20 is usual"
            )
        steps = (50 if led else 100) if self.steps is None else self.steps
        eta = self.eta if led else noisy_eta(self.sampler, self.eta, "--ddim_eta")
        return replace(self, steps=steps, eta=eta, noise_level=level)._checked(info, scale=9.0)


def noisy_eta(sampler: str, eta: float | None, flag: str) -> float:
    """As `sampler_eta`, for scripts whose DDIM is as noisy as DDPM unless another eta is asked for."""
    return sampler_eta(sampler, 1.0 if eta is None and sampler == "ddim" else eta, flag)


@dataclass(frozen=True)
class ClassConditionalRequest(SamplerSettings):
    """How samples of an unconditional or class-conditional model are drawn; the defaults are the published sample_diffusion's."""

    n_samples: int = 50000  # exactly so many, all classes together
    batch_size: int = 10
    steps: int = 50
    eta: float | None = None  # None: 1 with DDIM, as published, else the sampler's own
    vanilla: bool = False  # the ancestral chain over every timestep instead of a sampler
    seed: int = 42
    seed_mode: str = (
        "batch"  # one stream of noise for all; "image": sample k has that of seed + k, whatever the batches
    )
    scale: float = 1.0  # guidance of class-conditional models
    classes: tuple[int, ...] | None = None  # drawn in turn; None: every class, in an order that follows from the seed
    null_class: int | None = None  # what guidance leads away from; None: the model's own

    def checked(self, info: ModelInfo) -> ClassConditionalRequest:
        """The same settings with the model's own values filled in; ValueError names a flag, its value and the choices."""
        for flag, value in (("--n_samples", self.n_samples), ("--batch_size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{flag} {value}: choose 1 or more")
        check_steps("--custom_steps", self.steps, info)
        check_seed(self.seed)
        check_seed_mode(self.seed_mode)
        check_scale(self.scale)
        self.check_sampler(info, self.scale)
        if self.vanilla and (self.sampler, self.spacing) != ("ddim", "uniform"):
            given = f"--sampler {self.sampler}" if self.sampler != "ddim" else f"--spacing {self.spacing}"
            raise ValueError(f"-v with {given}: -v is the ancestral chain over every timestep; leave one of them out")
        eta = noisy_eta(self.sampler, self.eta, "--eta")
        require_unconditional_or_class(info)
        if info.n_classes is None:
            for flag, given in (("--classes", self.classes is not None), ("--null_class", self.null_class is not None)):
                if given:
                    raise ValueError(f"{flag}: this model knows no classes; leave it out")
            if self.scale != 1.0:
                raise ValueError(
                    f"--scale {self.scale:g}: this model has no condition that could be led to; leave --scale out"
                )
            return replace(self, eta=eta)
        bad = [c for c in (*(self.classes or ()), self.null_class) if c is not None and not 0 <= c < info.n_classes]
        if bad:
            raise ValueError(f"class {bad[0]}: this model knows 0 to {info.n_classes - 1}")
        null_class = info.null_class if self.null_class is None else self.null_class
        if self.scale != 1.0 and null_class is None:
            raise ValueError(
                f"--scale {self.scale:g}: the config names no class that means 'no class' (neither 1001 classes nor cond_dropout); "
                f"give --null_class N if the model was trained with one, e.g. {info.n_classes - 1}, or leave --scale out"
            )
        return replace(self, null_class=null_class, eta=eta)


def parse_classes(words: Sequence[str]) -> tuple[int, ...]:
    """Class numbers of the command line: `207`, `1,2,3` and `10-19` (both ends included), in the order given."""
    classes: list[int] = []
    for word in ",".join(words).split(","):
        first, dash, last = word.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--classes {word!r}: expected class numbers and ranges such as 207 or 1,2,10-19")
        if dash and int(last) < int(first):
            raise ValueError(f"--classes {word}: the range runs backwards")
        classes.extend(range(int(first), int(last or first) + 1))
    return tuple(classes)


def require_unconditional_or_class(info: ModelInfo) -> None:
    """ValueError where the model needs more than a class to draw, with the script that gives it."""
    name = info.condition_name
    if name == "__is_unconditional__" or info.n_classes is not None:
        return
    scripts = {"__is_first_stage__": "scripts/inpaint.py", "Identity": "scripts/upscale.py"}
    hint = scripts.get(name, f"{script_for(info)} if that is text")
    if name == "SpatialRescaler" or info.takes_tokens:
        hint = "a script of your own over ldm.inference"
    raise ValueError(f"this model draws only under a condition (cond_stage_config: {name}); use {hint}")


def require_inpainting_model(info: ModelInfo) -> None:
    """ValueError unless the model is given the masked picture's encoding and the mask beside the latent, as the published ones are."""
    needs = 2 * info.channels + 1
    if not (info.condition_name == "__is_first_stage__" or takes_text(info)) or info.unet_channels != needs:
        raise ValueError(
            f"this model fills no masks: it needs cond_stage_config __is_first_stage__ or a text encoder, and a UNet of {needs} input "
            f"channels (latent, masked picture, mask), it has {info.condition_name} and {info.unet_channels}; see "
            "models/ldm/inpainting_big/config.yaml and configs/stable-diffusion/v1-inpainting-inference.yaml"
        )


def require_upscaler(info: ModelInfo) -> None:
    """ValueError unless the model is given a low-resolution picture beside the latent, as the published ones are."""
    needs, led = info.channels + 3, takes_text(info) and info.max_noise_level is not None
    if not (info.condition_name == "Identity" or led) or info.unet_channels != needs:
        raise ValueError(
            f"this model enlarges nothing: it needs cond_stage_config torch.nn.Identity, or text and low_scale_config, and a UNet "
            f"of {needs} input channels (latent, low-resolution picture), it has {info.condition_name} and {info.unet_channels}; see "
            "models/ldm/bsr_sr/config.yaml and configs/stable-diffusion/x4-upscaling.yaml"
        )


def the_pair(picture: str | None, mask: str | None) -> list[tuple[Path, Path]]:
    """(picture, mask) of the two flags that name one pair."""
    for flag, given in (("--init-img", picture), ("--mask", mask)):
        if not given:
            raise ValueError(
                f"{flag}: give both, e.g. --init-img photo.png --mask hole.png, or a folder of pairs with --indir"
            )
        if not Path(given).is_file():
            raise FileNotFoundError(f"{flag} {given}: no such file")
    return [(Path(picture), Path(mask))]


def find_pairs(folder: str | Path, extensions: Iterable[str]) -> list[tuple[Path, Path]]:
    """(picture, mask) for every `x_mask.png` of a folder, sorted; the picture is `x.png`, else `x` with another known ending."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--indir {folder}: no such folder; it should hold pairs x.png, x_mask.png")
    pairs = []
    for mask in sorted(folder.glob("*_mask.png")):
        stem = mask.name.removesuffix("_mask.png")
        names = [f"{stem}{ending}" for ending in (".png", *sorted(set(extensions) - {".png"}))]
        picture = next((folder / name for name in names if (folder / name).is_file()), None)
        if picture is None:
            raise FileNotFoundError(f"{mask}: there is no {folder / names[0]} that belongs to it")
        pairs.append((picture, mask))
    if not pairs:
        raise FileNotFoundError(f"--indir {folder}: holds no x_mask.png; a mask is white where x.png is to be filled")
    return pairs


class SavedRun(NamedTuple):
    """Where a model lies: its folder, the configs to merge, its weights."""

    folder: Path
    configs: list[Path]
    ckpt: Path


def find_run(resume: str | Path) -> SavedRun:
    """What `--resume` names: a run folder, or a checkpoint file in one or in its folder `checkpoints`.

    The config is `config.yaml`, as in the folders of released models, or the run's `configs/*-project.yaml`.
    Raises FileNotFoundError in one line for what is not there.
    """
    given = Path(resume).expanduser()
    if given.is_file():
        folder, ckpt = given.parent, given
    elif given.is_dir():
        folder = given
        candidates = [
            folder / name for name in ("model.ckpt", "checkpoints/last.ckpt", "last.ckpt", "model.safetensors")
        ]
        ckpt = next((path for path in candidates if path.is_file()), None)
        if ckpt is None and (folder / "unet" / "config.json").is_file():  # diffusers' layout
            ckpt = folder
        if ckpt is None:
            hint = (
                "; bash scripts/download_models.sh brings released ones" if (folder / "config.yaml").is_file() else ""
            )
            raise FileNotFoundError(
                f"--resume {given}: holds neither model.ckpt nor checkpoints/last.ckpt; name the file itself{hint}"
            )
    else:
        raise FileNotFoundError(f"--resume {given}: no such file or folder; give a run folder or a checkpoint")
    for place in (folder, folder.parent) if folder.resolve().name == "checkpoints" else (folder,):
        configs = (
            [place / "config.yaml"]
            if (place / "config.yaml").is_file()
            else sorted((place / "configs").glob("*-project.yaml"))
        )
        if configs:
            return SavedRun(place, configs, ckpt)
    raise FileNotFoundError(
        f"--resume {given}: its folder holds neither config.yaml nor configs/*-project.yaml, which describe the model"
    )
