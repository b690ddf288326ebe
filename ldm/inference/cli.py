"""What the sampling scripts share: their common flags, the checks before a model is loaded, and how pictures are written and reported."""

from __future__ import annotations

import argparse
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import Parser
from ldm.inference.settings import PRECISIONS, SAFETY_MODES, SEED_MODES, TILE, ModelInfo, read_prompts
from ldm.models.diffusion.samplers.registry import SAMPLERS
from ldm.output.images import GeneratedImage, Output
from ldm.output.safety import Safety, SafetySettings
from ldm.output.watermark import METHODS, Watermark
from ldm.paths import find_file

if TYPE_CHECKING:
    from ldm.checkpoint import WeightsSource

STABLE_DIFFUSION = {
    "config": "configs/stable-diffusion/v1-inference.yaml",
    "ckpt": "models/ldm/stable-diffusion-v1/model.ckpt",
}
WHERE = {
    STABLE_DIFFUSION[
        "ckpt"
    ]: "put sd-v1-4.ckpt of https://huggingface.co/CompVis/stable-diffusion-v-1-4-original there",
    "models/ldm/text2img-large/model.ckpt": "put https://ommer-lab.com/files/latent-diffusion/nitro/txt2img-f8-large/model.ckpt there",
}


def add_prompt_flags(parser: Parser, scale: float, n_iter: int, n_samples: int) -> None:
    """The flags of scripts that draw prompts, with the published defaults of the script."""
    add = parser.add_argument
    add("--prompt", nargs="?", default="a painting of a virus monster playing guitar", help="what to draw")
    add("--negative_prompt", default="", metavar="TEXT", help="what to lead away from; needs a --scale other than 1")
    add("--from-file", metavar="FILE", help="draw every line of this file instead of --prompt, n_samples lines at once")
    add("--skip_grid", action="store_true", help="write no grid")
    add("--skip_save", action="store_true", help="write no single samples")
    add("--captions", action="store_true", help="write each prompt under its picture in the grid")
    add("--ddim_steps", type=int, default=50, metavar="S", help="number of sampling steps")
    add("--fixed_code", action="store_true", help="start every batch from the same noise")
    text = "noise of the steps (default: 0 with DDIM, which is deterministic, else the sampler's own)"
    add("--ddim_eta", type=float, metavar="ETA", help=text)
    add("--n_iter", type=int, default=n_iter, metavar="N", help="how often to draw all prompts")
    add("--C", type=int, help="channels of the latents (default: the model's; Stable Diffusion 4)")
    add("--f", type=int, help="pixels per latent cell (default: the model's; Stable Diffusion 8)")
    add("--n_samples", type=int, default=n_samples, metavar="N", help="how many pictures to draw at once")
    add("--n_rows", type=int, default=0, metavar="N", help="pictures in a row of the grid (default: n_samples)")
    add("--scale", type=float, default=scale, help="guidance scale; 1 is none")
    add_seed_mode_flag(parser)
    text = f"let the first stage see overlapping tiles of SIDE pixels (default: off; {TILE} without a number), which needs less memory"
    add("--tiled", type=int, nargs="?", const=TILE, default=0, metavar="SIDE", help=text)


def add_text_flags(parser: Parser) -> None:
    """What may be asked of the reading of prompts."""
    add = parser.add_argument
    add(
        "--emphasis",
        action="store_true",
        help="weigh words: (word:1.3), (word) for 1.1, [word] for 1/1.1; \\( is a bracket",
    )
    add("--long_prompts", action="store_true", help="encode prompts over 75 tokens in chunks instead of cutting them")


def add_seed_mode_flag(parser: Parser) -> None:
    text = "batch: one stream of noise, as published; image: picture k has the noise of seed + k, whatever the batches"
    parser.add_argument("--seed_mode", choices=SEED_MODES, default="batch", help=text)


def add_sampler_flag(parser: argparse._ActionsContainer) -> None:
    """`--sampler`, on a parser or in one of its groups."""
    parser.add_argument("--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: ddim)")


def add_sampling_flags(parser: Parser, guidance: bool = True) -> None:
    """What samplers take beside their steps; without `guidance` not what is about that."""
    add = parser.add_argument
    grids = ", ".join(dict.fromkeys(grid for entry in SAMPLERS.values() for grid in entry.spacings))
    add(
        "--spacing",
        default="uniform",
        metavar="NAME",
        help=f"how the steps are spread: {grids}; not every sampler takes each",
    )
    if guidance:
        text = "bring the guided output's deviation back to the unguided one's by this share: 0 off, 0.7 usual"
        add("--guidance_rescale", type=float, default=0.0, metavar="SHARE", help=text)
    text = "keep each prediction within the magnitude that this share of it stays below, e.g. 0.995 (default: off)"
    add("--dynamic_threshold", type=float, metavar="SHARE", help=text)


def add_model_flags(parser: Parser, config: str | None, ckpt: str | None, fill_in: bool = True) -> None:
    """The flags that name a model and how to compute with it; `config` None leaves both files out.

    fill_in: whether the files are the flags' defaults, or only named as such, for a script that has several.
    """
    add = parser.add_argument
    if config is not None:
        default = {} if fill_in else {"config": None, "ckpt": None}
        add(
            "--config",
            default=default.get("config", config),
            metavar="YAML",
            help=f"the model's config (default: {config})",
        )
        text = f"the model's weights, .ckpt, .safetensors or a diffusers folder (default: {ckpt})"
        add("--ckpt", default=default.get("ckpt", ckpt), metavar="FILE", help=text)
    text = "draw with the averaged weights of a file, or with the trained ones (default: as the config says)"
    add("--use_ema", action=BooleanOptionalAction, help=text)
    text = (
        "numbers that the networks compute in. auto: bf16 where the device has instructions for it, else full. full: float32. autocast: "
        "float32 weights, computed in half precision where that is faster. bf16, fp16: weights of 16 bits (default: auto)"
    )
    add("--precision", choices=PRECISIONS, default="auto", help=text)
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps")
    add_output_flags(parser)
    add(
        "--allow-targets",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="let the config name classes of this package too",
    )
    add("--debug", action="store_true", help="show the traceback of an error")


def add_output_flags(parser: Parser) -> None:
    """The flags of the way out of every script that draws: the safety check and the watermark."""
    add = parser.add_argument
    text = "of what the safety checker flags, write a black picture (on) or say so (report); off: no check (default: the config's)"
    add("--safety", choices=SAFETY_MODES, help=text)
    text = "the safety checker, config.json and its weights (default: models/safety_checker where it is there, else the hub's)"
    add("--safety_checker", metavar="FOLDER", help=text)
    add(
        "--watermark",
        choices=(*METHODS, "off"),
        help=f"invisible mark in pictures of 256x256 pixels and more (default: {METHODS[0]})",
    )


def safety_of(opt: Namespace, info: ModelInfo) -> Safety:
    """The safety check that the flags and the config ask for, ready; an error in one line where it cannot run."""
    return Safety(SafetySettings(opt.safety, opt.safety_checker).checked(info)).ready()


def watermark_of(opt: Namespace) -> Watermark | None:
    """The mark that the flag names, None for off."""
    if opt.watermark is not None and opt.watermark != "off" and find_spec("imwatermark") is None:
        raise ImportError(f"--watermark {opt.watermark}: pip install invisible-watermark brings what it needs")
    return None if opt.watermark == "off" else Watermark(opt.watermark or METHODS[0])


def prompt_settings(opt: Namespace) -> dict[str, Any]:
    """The values of `add_prompt_flags` under the names of `TextToImageRequest`."""
    names = {"negative_prompt": "negative_prompt", "steps": "ddim_steps", "scale": "scale", "channels": "C"}
    names |= {"factor": "f", "eta": "ddim_eta"}
    same = (
        "seed",
        "seed_mode",
        "n_samples",
        "n_iter",
        "fixed_code",
        "tiled",
        "spacing",
        "guidance_rescale",
        "dynamic_threshold",
    )
    tools = {name: getattr(opt, name) for name in ("emphasis", "long_prompts", "chunks") if hasattr(opt, name)}
    return (
        {name: getattr(opt, flag) for name, flag in names.items()} | {name: getattr(opt, name) for name in same} | tools
    )


def prompts_of(opt: Namespace) -> str | list[str]:
    """The one prompt, or the lines of the file; of a picture that is drawn again, what makes its batches."""
    if opt.from_file:
        return read_prompts(opt.from_file)
    recorded = getattr(opt, "recorded", None)
    return opt.prompt or "" if recorded is None else recorded.prompts(opt.prompt or "")


def released_weights(path: str) -> Path:
    """The file of a released model, which its archive may hold under either of the published names, last.ckpt and model.ckpt."""
    other = {"last.ckpt": "model.ckpt", "model.ckpt": "last.ckpt"}[Path(path).name]
    names = [find_file(path), find_file(Path(path).with_name(other))]
    return next((file for file in names if file.is_file()), names[0])


def open_ckpt(opt: Namespace, ckpt: Path, where: Mapping[str, str] = WHERE) -> WeightsSource:
    """The weights of --ckpt. where: how to get the file that a flag's default names, for the error if it is missing."""
    from ldm.checkpoint import MissingWeightsError, open_weights  # brings torch

    try:
        return open_weights(ckpt)
    except MissingWeightsError as error:
        hint = where.get(getattr(opt, "ckpt", ""), "your own runs keep theirs in <run folder>/checkpoints/last.ckpt")
        message = f"checkpoint {ckpt}: no such file; {hint}, or pass --ckpt FILE with its --config"
        raise FileNotFoundError(message) from error


def check_ready(opt: Namespace) -> None:
    """The last checks before the model is loaded: the grid and the device."""
    if getattr(opt, "n_rows", 0) < 0:
        raise ValueError(f"--n_rows {opt.n_rows}: choose 1 or more, or 0 for n_samples")
    from ldm.inference import choose_device

    choose_device(opt.device)
    if opt.allow_targets:
        from ldm.config.instantiate import allow_targets

        allow_targets(*opt.allow_targets)


def write_images(drawn: Iterable[GeneratedImage], output: Output, opt: Namespace) -> None:
    """Write samples as they come, then their grid, and report."""
    start, files, pictures, count = time.perf_counter(), [], [], 0
    for picture in map(output.checked, drawn):
        count += 1
        if not opt.skip_save:
            files.append(output.save_sample(picture))
        if not opt.skip_grid:
            pictures.append(picture)
    seconds = time.perf_counter() - start
    if pictures:
        files.append(output.save_grid(grid_of(pictures, opt.n_rows or opt.n_samples, opt.captions)))
    report(count, seconds, files)


def report(count: int, seconds: float, files: Sequence[Path]) -> None:
    """How many pictures in which time, and where they are."""
    print(
        f"{count} pictures in {seconds:.1f} s, {seconds / count:.2f} s each"
        if count != 1
        else f"1 picture in {seconds:.1f} s"
    )
    if files:
        names = [str(file) for file in files]
        print("\n".join(names if len(names) <= 8 else [*names[:3], f"... {len(names) - 5} more", *names[-2:]]))


def grid_of(pictures: list[GeneratedImage], columns: int, captions: bool) -> GeneratedImage:
    """All pictures in the published grid; with captions, roomier and on white."""
    from ldm.visualize import grid

    images, prompts = [picture.image for picture in pictures], [picture.info["prompt"] for picture in pictures]
    image = (
        grid(images, prompts, columns, padding=12) if captions else grid(images, columns=columns, background="black")
    )
    shared = {
        key: value for key, value in pictures[0].info.items() if all(picture.info[key] == value for picture in pictures)
    }
    flagged = [picture.info.get("flagged") for picture in pictures]
    info = {**shared, "prompts": prompts, "flagged": None if None in flagged else any(flagged)}
    return GeneratedImage(image, info, checked=all(picture.checked for picture in pictures))
