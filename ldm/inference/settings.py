"""Base of all requests: the sampler's settings and the checks that every task shares. Imports no torch."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Self

from ldm.config.model_info import ModelInfo
from ldm.models.diffusion.samplers.registry import SAMPLERS
from ldm.paths import find_file, in_checkout

PRECISIONS = ("auto", "full", "autocast", "bf16", "fp16")
LORA_MODES = ("merged", "live")
QUANTIZATIONS = ("int8", "fp8", "int4")
OFFLOADS = {  # --offload -> the stages of a model that it keeps on the CPU; `all` moves the network away for them
    "text": ("cond_stage_model",),
    "vae": ("first_stage_model",),
    "all": ("cond_stage_model", "first_stage_model"),
}
MAX_STRENGTH = 1000  # of a LoRA, far above every strength in use
MAX_SEED = 2**32 - 1
SEED_MODES = ("batch", "image")
MAX_SCALE = 1000  # far above every scale in use
MAX_SIDE = 65536  # pixels
MAX_MERGING = 0.75  # of each 2x2 tokens, one stays
MAX_COUNT = 1_000_000  # images in a run
AUTO, MAX_AUTO = "auto", 16  # --n_samples: a batch by free memory, of so many prompts of a list at most
TILE = 512  # usual side of a tile, in pixels


@dataclass(frozen=True)
class Request:
    """The request of a task. `checked` resolves every None once; nothing downstream checks again."""

    task: ClassVar[str]  # in the metadata
    steps_flag: ClassVar[str] = "--steps"
    eta_flag: ClassVar[str] = "--ddim_eta"
    usual_scale: ClassVar[float] = 7.5
    unrecorded: ClassVar[tuple[str, ...]] = ()  # fields that are not part of the metadata
    image_scale = 1.0  # guidance by an image: no field, but of edits
    checked_for: ClassVar[ModelInfo | None] = None  # set on the instance that `checked` returns

    sampler: str = "ddim"
    steps: int | None = 50
    eta: float | None = None  # noise per step: 0 deterministic, 1 that of DDPM; None: the sampler's default, 0 for DDIM
    scale: float | None = None  # guidance, eps = eps_uncond + scale * (eps_cond - eps_uncond); 1 disables it
    negative_prompt: str = ""  # conditioning of eps_uncond; empty as published
    seed: int = 42
    spacing: str = "uniform"  # timestep spacing
    guidance_rescale: float = 0.0  # 0 off, 0.7 usual (arXiv 2305.08891, section 3.4)
    guidance_interval: Sequence[float] = ()  # guide at noise levels between two (arXiv 2404.07724); empty: at all
    dynamic_threshold: float | None = None  # a quantile, 0.995 usual (Imagen, arXiv 2205.11487, section 2.3); None off
    deep_cache: int = 1  # the deep blocks run in every so many network calls (arXiv 2312.00858); 1: in all
    token_merging: float = 0.0  # share of the tokens merged in self-attention (arXiv 2303.17604); 0: none

    def checked(self, info: ModelInfo) -> Self:
        """Return the request with every default resolved for a model.

        Raises ValueError with the flag, its value and the choices. A checked request is returned as it is.
        """
        if self.checked_for == info:
            return self
        request = self._resolved(info)
        object.__setattr__(request, "checked_for", info)
        return request

    def record(self) -> dict[str, Any]:
        """The request as metadata of an image."""
        return {"task": self.task, **{name: x for name, x in asdict(self).items() if name not in self.unrecorded}}

    @property
    def guided(self) -> bool:
        """True if steps need the unconditional prediction."""
        return self.scale != 1.0 or self.image_scale != 1.0

    @property
    def prediction_options(self) -> dict[str, Any]:
        """Keyword arguments for `Sampler.decode`."""
        return {
            "guidance_rescale": self.guidance_rescale,
            "guidance_interval": tuple(self.guidance_interval),
            "dynamic_threshold": self.dynamic_threshold,
        }

    def _resolved(self, info: ModelInfo) -> Self:
        """Check what all requests have in common; subclasses fill in their own defaults first."""
        check_steps(self.steps_flag, self.steps, info)
        require(0 <= self.seed <= MAX_SEED, f"--seed {self.seed}: choose 0 to {MAX_SEED}")
        check_text("--negative_prompt", self.negative_prompt)
        eta = self._resolved_eta()
        self._check_spacing(info)
        self._check_guidance()
        self._check_saved_work(info)
        return replace(self, eta=eta)

    def _resolved_eta(self) -> float:
        require(self.sampler in SAMPLERS, f"--sampler {self.sampler}: choose one of {', '.join(SAMPLERS)}")
        default, adjustable = SAMPLERS[self.sampler].default_eta, SAMPLERS[self.sampler].takes_eta
        if self.eta is None:
            return default
        require(0 <= self.eta <= 1, f"{self.eta_flag} {self.eta}: choose 0 (deterministic) to 1 (the noise of DDPM)")
        fixed = "has a fixed eta of 1" if default else "is deterministic (eta 0)"
        others = ", ".join(name for name, entry in SAMPLERS.items() if entry.takes_eta)
        require(
            self.eta == default or adjustable,
            f"{self.eta_flag} {self.eta:g}: {self.sampler} {fixed}; remove the flag, or choose a sampler with an "
            f"adjustable eta: {others}",
        )
        return self.eta

    def _check_spacing(self, info: ModelInfo) -> None:
        entry, flag = SAMPLERS[self.sampler], f"--spacing {self.spacing}"
        require(self.spacing in entry.spacings, f"{flag}: {self.sampler} supports {', '.join(entry.spacings)}")
        require(
            not (info.zero_terminal_snr and entry.continuous_time) or self.spacing == "trailing",
            f"{flag}: {self.sampler} cannot start at zero terminal SNR, as this model's schedule has; choose trailing",
        )

    def _check_guidance(self) -> None:
        valid = self.scale is not None and abs(self.scale) <= MAX_SCALE
        require(valid, f"--scale {self.scale}: choose -{MAX_SCALE} to {MAX_SCALE}; 1 disables guidance")
        require(
            not self.negative_prompt or self.scale != 1.0,
            "--negative_prompt with --scale 1: scale 1 disables guidance; choose another scale, "
            f"{self.usual_scale:g} is usual",
        )
        rescale, threshold, ends = self.guidance_rescale, self.dynamic_threshold, self.guidance_interval
        require(0.0 <= rescale <= 1.0, f"--guidance_rescale {rescale}: choose 0 (off) to 1; 0.7 is usual")
        require(
            not rescale or self.scale != 1.0,
            f"--guidance_rescale {rescale:g} with --scale 1: scale 1 disables guidance; remove one of them",
        )
        require(
            not ends or (len(ends) == 2 and 0.0 <= ends[0] < ends[1]),
            f"--guidance_interval {' '.join(map('{:g}'.format, ends))}: choose LOW < HIGH from 0 on; 0.3 5.4 is usual",
        )
        require(
            not ends or self.guided,
            "--guidance_interval with --scale 1: scale 1 disables guidance; remove one of them",
        )
        require(
            threshold is None or 0.0 < threshold <= 1.0,
            f"--dynamic_threshold {threshold}: choose a quantile above 0 and up to 1; 0.995 is usual",
        )

    def _check_saved_work(self, info: ModelInfo) -> None:
        cache, merging = f"--deep_cache {self.deep_cache}", f"--token_merging {self.token_merging:g}"
        require(1 <= self.deep_cache <= info.timesteps, f"{cache}: choose 1 (off) to {info.timesteps}; 2 is usual")
        require(
            self.deep_cache == 1 or info.unet_name == "UNetModel",
            f"{cache}: requires a UNetModel; this model's network is {info.unet_name}",
        )
        valid = 0.0 <= self.token_merging <= MAX_MERGING
        require(valid, f"{merging}: choose 0 (off) to {MAX_MERGING}; 0.5 is usual")
        require(
            not self.token_merging or info.context_dim is not None,
            f"{merging}: this model's network has no spatial transformers; remove the flag",
        )


def require(valid: bool, message: str) -> None:
    if not valid:
        raise ValueError(message)


def check_steps(flag: str, steps: int | None, info: ModelInfo) -> None:
    valid = steps is not None and 1 <= steps <= info.timesteps
    require(valid, f"{flag} {steps}: choose 1 to {info.timesteps}, the length of this model's noise schedule")


def check_positive(values: Mapping[str, int | None]) -> None:
    """Raise ValueError for the first flag whose value is below 1 or above MAX_COUNT; None is not checked."""
    for flag, value in values.items():
        require(value is None or 1 <= value <= MAX_COUNT, f"{flag} {value}: choose 1 to {MAX_COUNT:,}")


def check_text(flag: str, text: str) -> None:
    """Raise ValueError for text that was not valid UTF-8: Python keeps undecodable bytes as lone surrogates."""
    bad = next((k for k, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
    if bad is not None:
        raise ValueError(
            f"{flag} {text[:40]!a}: not UTF-8 text (character {bad + 1}); use UTF-8 in the terminal and in the locale, "
            "e.g. LC_ALL=C.UTF-8"
        )


def parse_batch_size(text: str) -> int | str:
    """`--n_samples`: a number or AUTO; raise ArgumentTypeError for other text."""
    try:
        return text if text == AUTO else int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r}: pass a number or {AUTO}") from None


def check_seed_mode(mode: str) -> None:
    require(mode in SEED_MODES, f"--seed_mode {mode}: choose one of {', '.join(SEED_MODES)}")


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise ValueError, with the nearest valid size, unless both sides are positive multiples of `multiple` pixels."""
    most = MAX_SIDE // multiple * multiple
    near_height, near_width = (min(round_to_multiple(side, multiple), most) for side in (height, width))
    require(
        (near_height, near_width) == (height, width),
        f"--H {height} --W {width}: this model needs multiples of {multiple} pixels; "
        f"nearest are --H {near_height} --W {near_width}",
    )


def check_quantize(name: str) -> None:
    """Raise ValueError for an unknown quantization, ImportError without the package for it."""
    require(name in QUANTIZATIONS, f"--quantize {name}: choose one of {', '.join(QUANTIZATIONS)}")
    if find_spec("torchao") is None:
        raise ImportError(f"--quantize {name} needs torchao: pip install -e '.[quantize]'")


def check_offload(name: str, device: str, compiler: str | None = None) -> None:
    """Raise ValueError for an unknown name, a device type without memory of its own, a compiled network that moves."""
    require(name in OFFLOADS, f"--offload {name}: choose one of {', '.join(OFFLOADS)}")
    require(device == "cuda", f"--offload {name}: the model is on {device}, which saves no memory; remove the flag")
    require(
        name != "all" or compiler is None,
        "--offload all with --compile: a compiled network stays where it is; choose --offload vae or text, or remove "
        "--compile",
    )


def round_to_multiple(side: int, multiple: int) -> int:
    """The nearest multiple, at least one."""
    return max(multiple, round(side / multiple) * multiple)


def parse_lora(text: str) -> tuple[Path, float]:
    """`FILE[:strength]` as (path, strength), 1 by default; FILE may contain colons, or be a run directory.

    Raises ValueError or FileNotFoundError.
    """
    path, strength = find_file(text), 1.0
    before, _, after = text.rpartition(":")
    if not path.exists() and before:
        with suppress(ValueError):  # a colon in the name, as in C:\loras
            path, strength = find_file(before), float(after)
    require(
        math.isfinite(strength) and abs(strength) <= MAX_STRENGTH,
        f"--lora {text}: choose a strength of -{MAX_STRENGTH} to {MAX_STRENGTH}; 1 is usual",
    )
    if not path.exists():
        raise FileNotFoundError(f"--lora {text}: no such file; pass FILE or FILE:strength, e.g. style.safetensors:0.8")
    trained = path / "checkpoints" / "lora.safetensors"
    return trained if trained.is_file() else path, strength


def parse_embedding(text: str) -> tuple[Path, str | None]:
    """`FILE[:token]` as (path, token or None); FILE may contain colons, or be the directory of a run with one token.

    Raises ValueError or FileNotFoundError.
    """
    before, _, token = text.rpartition(":")
    for path, name in ((find_file(text), None), (find_file(before or text), token or None)):
        if path.exists():
            trained = [file for file in sorted(path.glob("checkpoints/*.safetensors")) if file.stem != "lora"]
            require(
                len(trained) < 2,
                f"--embedding {path}: trained {len(trained)} tokens; pass {' or '.join(map(str, trained))}",
            )
            return trained[0] if trained else path, name
    raise FileNotFoundError(f"--embedding {text}: no such file; pass FILE or FILE:token, e.g. cat.safetensors:<cat>")


def embedding_text(path: Path, token: str | None) -> str:
    """`--embedding` that `parse_embedding` reads."""
    return in_checkout(path) + (f":{token}" if token else "")


def lora_text(path: Path, strength: float) -> str:
    """`--lora` that `parse_lora` reads."""
    return f"{in_checkout(path)}:{strength!r}"
