"""Requests of all tasks: what a task is asked for, checked once against the model's info. Imports no torch."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

from ldm.config.instantiate import value_at
from ldm.config.model_info import CANNY, DETECTORS, ModelInfo
from ldm.inference.emphasis import parse_emphasis
from ldm.inference.settings import (
    MAX_SCALE,
    MAX_SIDE,
    TILE,
    Request,
    check_positive,
    check_seed_mode,
    check_size,
    check_text,
    require,
    round_to_multiple,
)

logger = logging.getLogger(__name__)

GUIDANCE_SCALE = 3.0  # as in the image log
MAX_FEATHER = 512  # pixels
CLIP_ENCODERS = ("FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder", "CaptionEmbedder")  # of CLIP's tokens
OTHER_ENCODERS = ("BERTEmbedder",)


class Batch(NamedTuple):
    """Images that are generated together: the batch's number, their indices in the run, their prompts."""

    number: int
    indices: range
    prompts: list[str]


@dataclass(frozen=True)
class TextToImageRequest(Request):
    """Images from prompts; the defaults are the published txt2img's."""

    task: ClassVar[str] = "txt2img"
    steps_flag: ClassVar[str] = "--ddim_steps"
    published_side: ClassVar[int] = 512  # pixels

    prompt: str | Sequence[str] = ""  # one for `n_samples` images, or a list with one image each
    scale: float | None = 7.5
    height: int | None = None  # in pixels; None: that of training, or the published one for the published models
    width: int | None = None
    channels: int | None = None  # of the latent; None: the model's
    factor: int | None = None  # pixels per latent cell; None: the model's
    n_samples: int = 3  # images per batch
    n_iter: int = 2  # repetitions of all prompts
    fixed_code: bool = False  # every batch starts from the same noise
    # "batch": one noise stream for the run, as published. "image": image k has the noise of seed + k in any batch.
    seed_mode: str = "batch"
    tiled: int = 0  # side in pixels of the overlapping tiles of the first stage; 0: untiled
    emphasis: bool = False  # prompts may weight words, (word:1.3)
    long_prompts: bool = False  # prompts longer than the encoder's context are encoded in chunks
    chunks: int | None = None  # chunks per prompt; None: as many as the longest prompt needs

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of a checked request."""
        assert self.height is not None and self.width is not None
        return self.height, self.width

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent of a checked request."""
        assert self.channels is not None and self.factor is not None
        height, width = self.size
        return self.channels, height // self.factor, width // self.factor

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    @property
    def batches(self) -> list[Batch]:
        """All batches of the run; the last one of a list of prompts may be smaller."""
        size, prompts = self.n_samples, self.prompts * (self.n_samples if isinstance(self.prompt, str) else 1)
        groups = [prompts[k : k + size] for k in range(0, len(prompts), size)]
        batches, first = [], 0
        for number, group in enumerate(groups * self.n_iter):
            batches.append(Batch(number, range(first, first + len(group)), group))
            first += len(group)
        return batches

    def in_batches_of(self, n_samples: int) -> Self:
        """A checked request with another batch size."""
        changed = replace(self, n_samples=n_samples)
        object.__setattr__(changed, "checked_for", self.checked_for)
        return changed

    def fitted(self, height: int, width: int, info: ModelInfo) -> Self:
        """The request for an image of this size, rounded to the nearest size that the model takes.

        An image with more pixels than in training is scaled down to as many; the published models take any number.
        """
        factor = self.factor or info.factor or 1
        scale = min(1.0, math.sqrt(self._most_pixels(info, factor) / (height * width)))
        return self._scaled((height, width), scale, factor * info.latent_multiple)

    def _scaled(self, size: tuple[int, int], scale: float, multiple: int) -> Self:
        """The request for an image of `size` times `scale`; raise ValueError if that is too large."""
        height, width = (round_to_multiple(round(side * scale), multiple) for side in size)
        advice = ", or choose a smaller --resolution" if getattr(self, "resolution", None) else ""
        require(
            max(height, width) <= MAX_SIDE,
            f"an image of {size[1]}x{size[0]} pixels would give one of {width}x{height}, more than {MAX_SIDE}: crop it"
            + advice,
        )
        return replace(self, height=height, width=width)

    def _most_pixels(self, info: ModelInfo, factor: int) -> float:
        return factor**2 * math.prod(info.own_size) if info.own_size else math.inf

    def _require_model(self, info: ModelInfo) -> None:
        require_text_model(info)

    def _resolved(self, info: ModelInfo) -> Self:
        self._require_model(info)
        check_positive(
            {"--n_samples": self.n_samples, "--n_iter": self.n_iter, "--f": self.factor, "--C": self.channels}
        )
        check_seed_mode(self.seed_mode)
        require(
            not self.fixed_code or self.seed_mode != "image",
            "--fixed_code with --seed_mode image: each image then has its own noise; remove one of them",
        )
        require(
            self.channels in (None, info.channels),
            f"--C {self.channels}: this model's latents have {info.channels} channels; remove --C",
        )
        factor = self.factor or info.factor
        if factor is None:
            raise ValueError("--f: the config does not state the downsampling factor; pass it, e.g. --f 8")
        height, width = self._resolved_size(info, factor)
        cell = info.factor or factor
        require(
            not self.tiled or (self.tiled >= 4 * cell and self.tiled % cell == 0),
            f"--tiled {self.tiled}: choose a multiple of {cell} pixels, at least {4 * cell}; {TILE} is usual",
        )
        self._check_prompts(info)
        resolved = replace(self, channels=info.channels, factor=factor, height=height, width=width)
        return super(TextToImageRequest, resolved)._resolved(info)

    def _resolved_size(self, info: ModelInfo, factor: int) -> tuple[int, int]:
        own = [side * factor for side in info.own_size] if info.own_size else [self.published_side] * 2
        height, width = (side if given is None else given for given, side in zip((self.height, self.width), own))
        check_size(height, width, factor * info.latent_multiple)
        if info.own_size and self.height is None and self.width is None:
            logger.info("%dx%d pixels, as in training (--H and --W choose another size)", width, height)
        elif info.own_size and not 1 / 2 <= height * width / (own[0] * own[1]) <= 2:
            text = "%dx%d pixels: the model was trained at %dx%d; images at other sizes are usually worse"
            logger.warning(text, width, height, own[1], own[0])
        return height, width

    def _check_prompts(self, info: ModelInfo) -> None:
        valid = self.chunks is None or (self.chunks >= 1 and self.long_prompts)
        require(valid, f"chunks {self.chunks}: choose 1 or more, with long_prompts")
        for flag, given in (("--emphasis", self.emphasis), ("--long_prompts", self.long_prompts)):
            require(
                not given or info.condition_name not in OTHER_ENCODERS,
                f"{flag}: requires one of {', '.join(CLIP_ENCODERS)}; this model's encoder is {info.condition_name}",
            )
        for prompt in self.prompts:
            check_text("--prompt", prompt)
        for prompt in (self.negative_prompt, *self.prompts) if self.emphasis else ():
            parse_emphasis(prompt)
        if self.scale != 1.0 and {self.negative_prompt.strip()} == {prompt.strip() for prompt in self.prompts}:
            same = "--negative_prompt is the prompt" if self.negative_prompt.strip() else "the prompt is empty"
            logger.warning("%s: --scale has no effect", same)


@dataclass(frozen=True)
class RetrievalRequest(TextToImageRequest):
    """Images from CLIP vectors of prompts and of nearest neighbors; the defaults are the published knn2img's."""

    task: ClassVar[str] = "knn2img"

    published_side: ClassVar[int] = 768

    scale: float | None = 5.0
    n_iter: int = 1

    def _require_model(self, info: ModelInfo) -> None:
        require(
            info.conditioning_key == "crossattn" and info.condition == "torch.nn.Identity",
            f"this model is not conditioned on CLIP vectors (cond_stage_config {info.condition}, conditioning_key "
            f"{info.conditioning_key}); configs/retrieval-augmented-diffusion/768x768.yaml is",
        )


@dataclass(frozen=True)
class ImageToImageRequest(TextToImageRequest):
    """Images from an image and prompts; the defaults are the published img2img's. `fitted` sets height and width."""

    task: ClassVar[str] = "img2img"
    unrecorded: ClassVar[tuple[str, ...]] = ("depth",)

    scale: float | None = 5.0
    n_samples: int = 2
    n_iter: int = 1
    strength: float = 0.75  # share of the noise schedule: 0 keeps the image, 1 ignores it
    depth: bool = False  # conditioned on a depth map

    @property
    def encode_steps(self) -> int:
        """Number of denoising steps: strength * steps, rounded down as published."""
        assert self.steps is not None
        return int(self.strength * self.steps)

    def _require_model(self, info: ModelInfo) -> None:
        require_text_model(info, concat_channels=1 if self.depth else 0)

    def _resolved(self, info: ModelInfo) -> Self:
        valid = 0.0 <= self.strength <= 1.0
        require(valid, f"--strength {self.strength}: choose 0 (keep the image) to 1 (ignore it); 0.75 is usual")
        request = super()._resolved(info)
        if request.strength > 0 and request.encode_steps == 0:
            least = math.ceil(1 / request.strength)
            text = "--strength %g of --ddim_steps %d is less than one step, so the image stays; choose %d steps or more"
            logger.warning(text, request.strength, request.steps, least)
        return request


@dataclass(frozen=True)
class EditRequest(TextToImageRequest):
    """Edits of an image by instructions, the prompts (InstructPix2Pix). `fitted` sets height and width."""

    task: ClassVar[str] = "edit"

    n_samples: int = 1
    n_iter: int = 1
    image_scale: float = 1.5  # guidance by the image, s_I of arXiv 2211.09800, eq. 3; 1 disables it
    resolution: int | None = None  # larger images are scaled down to this many pixels squared; None: as in training

    def _most_pixels(self, info: ModelInfo, factor: int) -> float:
        if self.resolution is not None:
            return self.resolution**2
        return super()._most_pixels(info, factor) if info.own_size else self.published_side**2

    def _require_model(self, info: ModelInfo) -> None:
        require_edit_model(info)

    def _resolved(self, info: ModelInfo) -> Self:
        valid = abs(self.image_scale) <= MAX_SCALE
        require(valid, f"--image-scale {self.image_scale}: choose -{MAX_SCALE} to {MAX_SCALE}; 1.5 is usual")
        check_positive({"--resolution": self.resolution})
        return super()._resolved(info)


@dataclass(frozen=True)
class ControlRequest(TextToImageRequest):
    """Images from prompts under one or several ControlNets. `fitted` sets height and width by the first control image.

    control_scale, detector: one value for each control; `checked` repeats a single one for all.
    """

    task: ClassVar[str] = "control2img"

    scale: float | None = 9.0
    n_samples: int = 1
    n_iter: int = 1
    controls: int = 1  # number of ControlNets, each with its image
    control_scale: tuple[float, ...] = (1.0,)  # factor of the ControlNet's outputs
    detector: tuple[str, ...] = ("none",)  # what makes the hint of the image, see ldm.data.detectors
    canny: tuple[int, int] = CANNY  # thresholds of the Canny detector
    guess: bool = False  # no control in the unconditional half of guidance, and less in the outer layers
    resolution: int | None = None  # shorter side in pixels; None: that of training, 512 for the published models

    def layer_scales(self, control: int, layers: int) -> list[float]:
        """Factors of a ControlNet's outputs, from the first skip connection to the middle (guess mode as published)."""
        factor = 0.825 if self.guess else 1.0
        return [self.control_scale[control] * factor ** (layers - 1 - layer) for layer in range(layers)]

    def fitted(self, height: int, width: int, info: ModelInfo) -> Self:
        """The request for a control image of this size: its proportions, `resolution`, and multiples of the model's."""
        factor = self.factor or info.factor or 1
        own = min(info.own_size) * factor if info.own_size else self.published_side
        scale = (self.resolution or own) / min(height, width)
        return self._scaled((height, width), scale, factor * info.latent_multiple)

    def _resolved(self, info: ModelInfo) -> Self:
        check_positive({"--resolution": self.resolution})
        for flag, values in (("--control-scale", self.control_scale), ("--detector", self.detector)):
            require(
                len(values) in (1, self.controls),
                f"{flag} is given {len(values)} times, for {self.controls} controls: give it once, or once for each",
            )
        for scale in self.control_scale:
            valid = abs(scale) <= MAX_SCALE
            require(valid, f"--control-scale {scale}: choose 0 (no control) to {MAX_SCALE}; 1 is usual")
        for name in self.detector:
            require(name in DETECTORS, f"--detector {name}: choose one of {', '.join(DETECTORS)}")
        require(
            self.deep_cache == 1,
            f"--deep_cache {self.deep_cache}: not supported under a ControlNet; remove the flag",
        )
        valid = len(self.canny) == 2 and 0 <= self.canny[0] <= self.canny[1]
        thresholds = " ".join(map(str, self.canny))
        require(valid, f"--canny {thresholds}: choose 0 <= LOW <= HIGH; {CANNY[0]} {CANNY[1]} is usual")
        require(not self.guess or self.scale != 1.0, "--guess with --scale 1: guess mode needs guidance; remove one")
        scales = self.control_scale * (self.controls // len(self.control_scale))
        detectors = self.detector * (self.controls // len(self.detector))
        return super(ControlRequest, replace(self, control_scale=scales, detector=detectors))._resolved(info)


@dataclass(frozen=True)
class ConcatRequest(Request):
    """One image from one that the network sees concatenated with the latent: inpainting and upscaling.

    Each image is generated from the seed itself, so it does not depend on the images before it.
    """

    prompt: str = ""  # for text-conditional models only

    def _resolved(self, info: ModelInfo) -> Self:
        check_text("--prompt", self.prompt)
        if info.factor is None:
            raise ValueError("first_stage_config: ddconfig.ch_mult is missing, so the downsampling factor is unknown")
        scale = (self.usual_scale if info.takes_text else 1.0) if self.scale is None else self.scale
        given = {"--prompt": self.prompt, "--negative_prompt": self.negative_prompt, "--scale": scale != 1.0}
        for flag, value in given.items():
            require(
                not value or info.takes_text,
                f"{flag}: this model is not text-conditional; remove the flag, or choose a text-conditional model with "
                "--config and --ckpt",
            )
        return super(ConcatRequest, replace(self, scale=scale))._resolved(info)


@dataclass(frozen=True)
class InpaintRequest(ConcatRequest):
    """Inpainting; the defaults are those of the published models."""

    task: ClassVar[str] = "inpaint"

    feather: int = 0  # pixels over which the generated image fades in from the mask's edge

    def _resolved(self, info: ModelInfo) -> Self:
        require_inpainting_model(info)
        if not info.concat_channels:
            text = "this model does not see the mask: the image is blended in at each step; %s is better"
            logger.info(text, f"an inpainting model ({2 * info.channels + 1} input channels)")
        valid = 0 <= self.feather <= MAX_FEATHER
        require(valid, f"--feather {self.feather}: choose 0 (a hard edge) to {MAX_FEATHER} pixels")
        return super()._resolved(info)


@dataclass(frozen=True)
class UpscaleRequest(ConcatRequest):
    """Upscaling; the defaults are those of the published models."""

    task: ClassVar[str] = "upscale"
    usual_scale: ClassVar[float] = 9.0

    steps: int | None = None  # None: 100, or 50 with a text-conditional model
    tile: int = 128  # side of a tile in input pixels; larger images are processed in overlapping tiles; 0: never
    noise_level: int | None = None  # noise added to the input, for models with noise-level conditioning; None: 20

    def _resolved(self, info: ModelInfo) -> Self:
        require_upscaler(info)
        unit, most, level = info.latent_multiple, info.max_noise_level, self.noise_level
        require(
            self.tile == 0 or (self.tile >= 2 * unit and self.tile % unit == 0),
            f"--tile {self.tile}: choose a multiple of {unit} pixels, at least {2 * unit}, or 0 to disable tiling; "
            "128 is usual",
        )
        require(
            self.deep_cache == 1 or not self.tile,
            f"--deep_cache {self.deep_cache}: not supported with tiles; pass --tile 0, or remove the flag",
        )
        if most is None:
            require(level is None, "--noise_level: this model has no noise-level conditioning; remove the flag")
        else:
            level = min(20, most) if level is None else level
            valid = 0 <= level <= most
            require(valid, f"--noise_level {level}: choose 0 (none) to {most}, the maximum in training; 20 is usual")
        steps = self.steps if self.steps is not None else 50 if info.takes_text else 100
        # The published super-resolution script runs DDIM at eta 1.
        eta = 1.0 if self.eta is None and self.sampler == "ddim" and not info.takes_text else self.eta
        return super(UpscaleRequest, replace(self, steps=steps, eta=eta, noise_level=level))._resolved(info)


@dataclass(frozen=True)
class ClassConditionalRequest(Request):
    """Samples of an unconditional or class-conditional model; the defaults are the published sample_diffusion's."""

    task: ClassVar[str] = "sample_diffusion"
    unrecorded: ClassVar[tuple[str, ...]] = ("classes", "negative_prompt")  # thousands of numbers in every file
    steps_flag: ClassVar[str] = "--custom_steps"
    eta_flag: ClassVar[str] = "--eta"

    scale: float | None = 1.0
    n_samples: int = 50000  # in total, over all classes
    batch_size: int = 10
    vanilla: bool = False  # ancestral sampling over every timestep
    seed_mode: str = "batch"  # as in TextToImageRequest
    classes: tuple[int, ...] | None = None  # used in turn; None: all classes, shuffled by the seed
    null_class: int | None = None  # class of the unconditional prediction; None: the model's

    def _resolved(self, info: ModelInfo) -> Self:
        require_unconditional_or_class(info)
        check_positive({"--n_samples": self.n_samples, "--batch_size": self.batch_size})
        check_seed_mode(self.seed_mode)
        given = f"--sampler {self.sampler}" if self.sampler != "ddim" else f"--spacing {self.spacing}"
        require(
            not self.vanilla or (self.sampler, self.spacing) == ("ddim", "uniform"),
            f"-v with {given}: -v is ancestral sampling over every timestep; remove one of them",
        )
        eta = 1.0 if self.eta is None and self.sampler == "ddim" else self.eta  # as published
        null_class = self._resolved_null_class(info)
        return super(ClassConditionalRequest, replace(self, null_class=null_class, eta=eta))._resolved(info)

    def _resolved_null_class(self, info: ModelInfo) -> int | None:
        n = info.n_classes
        if n is None:
            for flag, value in (("--classes", self.classes), ("--null_class", self.null_class)):
                require(value is None, f"{flag}: this model is not class-conditional; remove the flag")
            require(self.scale == 1.0, f"--scale {self.scale:g}: this model is unconditional; remove the flag")
            return None
        for label in (*(self.classes or ()), self.null_class):
            require(label is None or 0 <= label < n, f"class {label}: this model's classes are 0 to {n - 1}")
        null_class = info.null_class if self.null_class is None else self.null_class
        require(
            self.scale == 1.0 or null_class is not None,
            f"--scale {self.scale:g}: guidance needs a class that means 'no class', and the config states none (1001 "
            f"classes or cond_dropout); pass --null_class if the model was trained with one, e.g. {n - 1}, or remove "
            "--scale",
        )
        return null_class


@dataclass(frozen=True)
class ConditionalRequest(Request):
    """Samples of any conditional model, under conditions of its dataset or of named files."""

    task: ClassVar[str] = "sample_conditional"

    scale: float | None = None  # None: as in the image log, 3 for models that were trained with cond_dropout, else 1
    n_samples: int = 1  # of each condition
    batch_size: int = 8

    def _resolved(self, info: ModelInfo) -> Self:
        conditional = info.condition_name != "__is_unconditional__"
        require(conditional, "this model is unconditional; use scripts/sample_diffusion.py")
        check_positive({"--n_samples": self.n_samples, "--batch_size": self.batch_size})
        require(
            not self.negative_prompt or info.takes_text,
            "--negative_prompt: this model is not text-conditional; remove the flag",
        )
        dropout = float(value_at(info.config, "model", "params", "cond_dropout") or 0.0)
        scale = (GUIDANCE_SCALE if dropout else 1.0) if self.scale is None else self.scale
        if scale != 1.0 and not dropout and not info.takes_text:
            logger.warning("--scale %g: this model was trained without cond_dropout, which guidance needs", scale)
        return super(ConditionalRequest, replace(self, scale=scale))._resolved(info)


def require_text_model(info: ModelInfo, concat_channels: int = 0) -> None:
    """Raise ValueError unless the model is text-conditional and takes this many channels of concat conditioning."""
    name, has = info.condition_name, info.concat_channels
    text = (
        f"this model is not text-conditional (cond_stage_config: {name}); it takes no prompts; use {script_for(info)}"
    )
    require(info.takes_text, text)
    require(
        not concat_channels or has > 0,
        "--depth: this model is not conditioned on depth; remove the flag, or choose a depth model with --config",
    )
    require(
        has == concat_channels,
        f"this model needs more than a prompt ({has} channels of concat conditioning); use {script_for(info)}",
    )


def require_inpainting_model(info: ModelInfo) -> None:
    """Raise ValueError unless the network sees the masked image's latent and the mask, or takes text alone."""
    require(
        _inpaints(info) or _takes_text_alone(info),
        "not an inpainting model: expected cond_stage_config __is_first_stage__ or a text encoder, and a UNet with "
        f"{2 * info.channels + 1} input channels (latent, masked image, mask); got {info.condition_name} and "
        f"{info.unet_channels}; see models/ldm/inpainting_big/config.yaml and "
        f"configs/stable-diffusion/v1-inpainting-inference.yaml, or use {script_for(info)}",
    )


def require_edit_model(info: ModelInfo) -> None:
    """Raise ValueError unless the network sees the latent of the image to edit and is conditioned on text."""
    require(
        _edits(info),
        f"not an edit model: expected a text encoder and a UNet with {2 * info.channels} input channels (latent, "
        f"latent of the image); got {info.condition_name} and {info.unet_channels}; see "
        f"configs/instruct-pix2pix/generate.yaml, or use {script_for(info)}",
    )


def require_controls(info: ModelInfo, controlnets: int, images: int) -> int:
    """The number of ControlNets, that of the model included. Raises ValueError unless each has its control image."""
    own = value_at(info.config, "model", "params", "control_stage_config") is not None
    nets = own + controlnets
    require(nets > 0, "--controlnet: pass the weights of a ControlNet, or a --config and --ckpt that have one")
    model = ", that of the model included" if own else ""
    require(
        nets == images,
        f"--control-image is given {images} times, for {nets} ControlNets{model}: pass one for each",
    )
    return nets


def require_upscaler(info: ModelInfo) -> None:
    """Raise ValueError unless the network sees a low-resolution image, as in the published models."""
    require(
        _upscales(info),
        "not an upscaling model: expected cond_stage_config torch.nn.Identity or a SpatialRescaler of images, or a "
        f"text encoder and low_scale_config, and a UNet with {info.channels + 3} input channels (latent, "
        f"low-resolution image); got {info.condition_name} "
        f"and {info.unet_channels}; see models/ldm/bsr_sr/config.yaml and configs/stable-diffusion/x4-upscaling.yaml, "
        f"or use {script_for(info)}",
    )


def require_unconditional_or_class(info: ModelInfo) -> None:
    """Raise ValueError, with the script to use, unless the model is unconditional or class-conditional."""
    require(
        _samples_freely(info),
        f"this model needs more conditioning than a class (cond_stage_config: {info.condition_name}); "
        f"use {script_for(info)}",
    )


def script_for(info: ModelInfo) -> str:
    """The script that samples this model: that of its task, else the one that takes conditions of any kind."""
    depth = str(value_at(info.config, "model", "target")).endswith(".LatentDepth2ImageDiffusion")
    scripts = {
        "control2img.py": value_at(info.config, "model", "params", "control_stage_config") is not None,
        "txt2img.py": _takes_text_alone(info),
        "img2img.py with --depth": info.takes_text and depth,
        "edit.py": _edits(info),
        "inpaint.py": _inpaints(info),
        "upscale.py": _upscales(info),
        "sample_diffusion.py": _samples_freely(info),
        "knn2img.py": info.condition == "torch.nn.Identity" and info.conditioning_key == "crossattn",
    }
    return "scripts/" + next((script for script, fits in scripts.items() if fits), "sample_conditional.py")


def _takes_text_alone(info: ModelInfo) -> bool:
    return info.takes_text and not info.concat_channels and info.conditioning_key in (None, "crossattn")


def _edits(info: ModelInfo) -> bool:
    return info.takes_text and info.conditioning_key == "hybrid" and info.unet_channels == 2 * info.channels


def _inpaints(info: ModelInfo) -> bool:
    encoded = info.condition_name == "__is_first_stage__" or info.takes_text
    return encoded and info.unet_channels == 2 * info.channels + 1


def _upscales(info: ModelInfo) -> bool:
    by_text = info.takes_text and info.max_noise_level is not None
    by_image = info.condition_name == "Identity" or info.image_rescaling is not None
    return (by_image or by_text) and info.unet_channels == info.channels + 3


def _samples_freely(info: ModelInfo) -> bool:
    """A class, or nothing, is all that the model is conditioned on."""
    of_class = info.n_classes is not None and not info.concat_channels
    return info.condition_name == "__is_unconditional__" or of_class
