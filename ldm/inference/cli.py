"""Flags of the sampling scripts, and their checks before a model is loaded."""

from __future__ import annotations

import argparse
import logging
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ldm import cli as command_line
from ldm import inference
from ldm.cli import Parser
from ldm.config.instantiate import value_at
from ldm.config.model_info import SAFETY_MODES, ModelInfo, read_model_info
from ldm.config.trainer_keys import COMPILERS
from ldm.inference.from_metadata import check_unchanged
from ldm.inference.requests import TextToImageRequest
from ldm.inference.settings import (
    AUTO,
    LORA_MODES,
    MAX_AUTO,
    OFFLOADS,
    PRECISIONS,
    QUANTIZATIONS,
    SEED_MODES,
    TILE,
    Request,
    check_offload,
    check_quantize,
    parse_batch_size,
    parse_embedding,
    parse_lora,
    require,
)
from ldm.machine.allocator import reserve_memory
from ldm.models.diffusion.compile import check_compiler
from ldm.models.diffusion.samplers.registry import SAMPLERS
from ldm.output.safety import Safety, SafetySettings
from ldm.output.watermark import METHODS, Watermark
from ldm.paths import SD_CKPT, SD_SOURCE, find_file, fingerprint

logger = logging.getLogger(__name__)

EDIT_CONFIG, EDIT_CKPT = "configs/instruct-pix2pix/generate.yaml", "models/ldm/instruct-pix2pix/model.ckpt"
SD_CONFIG = "configs/stable-diffusion/v1-inference.yaml"
_RELEASED = ("models/ldm/inpainting_big/last.ckpt", "models/ldm/bsr_sr/model.ckpt")
_OMMER = "put https://ommer-lab.com/files"
_DOWNLOADS = {  # how to get the weights of the default models
    SD_CKPT: SD_SOURCE,
    EDIT_CKPT: "put instruct-pix2pix-00-22000.ckpt of https://huggingface.co/timbrooks/instruct-pix2pix there",
    "models/ldm/text2img-large/model.ckpt": f"{_OMMER}/latent-diffusion/nitro/txt2img-f8-large/model.ckpt there",
    "models/rdm/rdm768x768/model.ckpt": f"{_OMMER}/rdm/model.ckpt there",
    _RELEASED[0]: "bash scripts/download_models.sh inpainting_big downloads it",
    _RELEASED[1]: "bash scripts/download_models.sh sr_bsr downloads it",
}
RENAMED = {  # parsed argument -> field of a request, where they differ
    "ddim_steps": "steps",
    "custom_steps": "steps",
    "ddim_eta": "eta",
    "C": "channels",
    "f": "factor",
    "H": "height",
    "W": "width",
    "vanilla_sample": "vanilla",
}

R = TypeVar("R", bound=TextToImageRequest)
Files = str | Path | list[str] | None
"""A file that a flag names, those of a flag that is given several times, or None."""

# --- flags


class InputFile(argparse.Action):
    """Store the path of an input file; warn if the flag is given again with another file."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest, None)
        if before not in (None, values) and self.default != argparse.SUPPRESS:  # Parser.typed parses again
            logger.warning("%s is given twice: %s is used, not %s", option_string, values, before)
        setattr(namespace, self.dest, values)


def add_prompt_flags(
    parser: Parser,
    scale: float,
    n_iter: int,
    n_samples: int,
    text_encoder: bool = True,
    prompt: str | None = "a painting of a virus monster playing guitar",
    content: str = "what the images show",
) -> None:
    """Flags of the scripts that generate from prompts; text_encoder: the model's own, which can weight words."""
    add = parser.add_argument
    add("--prompt", nargs="?", default=prompt, help=content)
    add("--negative_prompt", default="", metavar="TEXT", help="negative prompt (requires --scale other than 1)")
    text = "one prompt per line, used instead of --prompt; --n_samples lines per batch"
    add("--from-file", action=InputFile, metavar="FILE", help=text)
    add("--skip_grid", action="store_true", help="do not save the grid")
    add("--skip_save", action="store_true", help="do not save the single images")
    add("--captions", action="store_true", help="print the prompt below each image of the grid")
    add("--ddim_steps", type=int, default=50, metavar="S", help="number of sampling steps, for every sampler")
    add("--fixed_code", action="store_true", help="start every batch from the same noise")
    text = "noise per step, from 0 (deterministic) to 1 (as DDPM) (default: 0 for DDIM, else the sampler's own)"
    add("--ddim_eta", type=float, metavar="ETA", help=text)
    text = "repetitions: N batches of --prompt, or N times every line of --from-file"
    add("--n_iter", type=int, default=n_iter, metavar="N", help=text)
    add("--C", type=int, help="channels of the latents (default: the model's)")
    add("--f", type=int, help="downsampling factor of the first stage (default: the model's)")
    text = f"images per batch; {AUTO}: as many as fit the free memory, up to the default, or {MAX_AUTO} of --from-file"
    add("--n_samples", type=parse_batch_size, default=n_samples, metavar="N", help=text)
    add("--n_rows", type=int, default=0, metavar="N", help="images in a row of the grid (default: n_samples)")
    add("--scale", type=float, default=scale, help="classifier-free guidance scale; 1 disables it")
    add_seed_flags(parser)
    text = f"decode in overlapping tiles of SIDE pixels, which saves memory (default: off; {TILE} if SIDE is omitted)"
    add("--tiled", type=int, nargs="?", const=TILE, default=0, metavar="SIDE", help=text)
    if text_encoder:
        text = "weight words: (word:1.3), (word) for 1.1, [word] for 1/1.1; \\( is a literal bracket"
        add("--emphasis", action="store_true", help=text)
        text = "encode prompts of more than 75 tokens in chunks instead of truncating them"
        add("--long_prompts", action="store_true", help=text)


def add_seed_flags(parser: Parser, seed: int | None = 42, modes: bool = True) -> None:
    text = "random seed" if seed is not None else "random seed, also of the order of classes (default: random, printed)"
    parser.add_argument("--seed", type=int, default=seed, help=text)
    if modes:
        text = "batch: one noise stream for the whole run, as published; image: image k depends on seed + k alone"
        parser.add_argument("--seed_mode", choices=SEED_MODES, default="batch", help=text)


def add_sampler_flag(parser: argparse._ActionsContainer) -> None:
    """`--sampler`, on a parser or in one of its groups."""
    parser.add_argument("--sampler", metavar="NAME", help=f"one of {', '.join(SAMPLERS)} (default: ddim)")


def add_sampling_flags(parser: Parser) -> None:
    """Sampler flags other than the step count and the scale."""
    add = parser.add_argument
    spacings = ", ".join(dict.fromkeys(spacing for entry in SAMPLERS.values() for spacing in entry.spacings))
    text = f"timestep spacing: {spacings}; not every sampler supports all of them"
    add("--spacing", default="uniform", metavar="NAME", help=text)
    text = "reduce over-exposure by guidance: 0 off, 0.7 usual, at most 1"
    add("--guidance_rescale", type=float, default=0.0, metavar="PHI", help=text)
    text = "guide only at noise levels between these, e.g. 0.3 5.4, which saves time (default: at all)"
    add("--guidance_interval", type=float, nargs=2, default=[], metavar=("LOW", "HIGH"), help=text)
    text = "clip each prediction to this quantile of its magnitude, e.g. 0.995 (default: off)"
    add("--dynamic_threshold", type=float, metavar="QUANTILE", help=text)
    text = "run the deep blocks of the network in every N-th call only, e.g. 2, which saves time (default: 1, in all)"
    add("--deep_cache", type=int, default=1, metavar="N", help=text)
    text = "merge this share of the tokens in self-attention, e.g. 0.5, which saves time on large images (default: 0)"
    add("--token_merging", type=float, default=0.0, metavar="RATIO", help=text)


def add_single_image_flags(parser: Parser, steps: int | None, scale: float) -> None:
    """Flags of the scripts that turn one image into one: inpainting and upscaling."""
    add = parser.add_argument
    add("--prompt", default="", metavar="TEXT", help="what the image shows (text-conditional models only)")
    add("--negative_prompt", default="", metavar="TEXT", help="negative prompt (text-conditional models only)")
    text = f"classifier-free guidance scale; 1 disables it (default: {scale:g} for text-conditional models)"
    add("--scale", type=float, help=text)
    text = "number of sampling steps" + ("" if steps else " (default: 100; 50 for text-conditional models)")
    add("--steps", type=int, default=steps, metavar="S", help=text)
    default = "0 for DDIM" if steps else "1 for DDIM, 0 for DDIM with a text-conditional model"
    text = f"noise per step, from 0 (deterministic) to 1 (as DDPM) (default: {default}, else the sampler's own)"
    add("--ddim_eta", type=float, metavar="ETA", help=text)
    add_sampler_flag(parser)
    add_sampling_flags(parser)
    add_seed_flags(parser, modes=False)


def add_size_flags(parser: Parser, default: int) -> None:
    """Size of the images; the default is the published one, see `TextToImageRequest`."""
    for flag, side in (("--H", "height"), ("--W", "width")):
        text = f"image {side} in pixels (default: that of training; {default} for the published models)"
        parser.add_argument(flag, type=int, default=default, help=text)


def add_clip_flags(parser: Parser, what: str) -> None:
    """The CLIP of retrieval-augmented models."""
    add = parser.add_argument
    add("--clip_type", default="ViT-L/14", metavar="NAME", help=f"CLIP version that embeds the {what}")
    text = "its weights in open_clip's format (default: from the Hugging Face hub or its cache)"
    add("--clip_weights", metavar="FILE", help=text)


def add_model_flags(
    parser: Parser, config: str | None, ckpt: str | None, fill_in: bool = True, measures: bool = False
) -> None:
    """Flags of the model and of the output; `config` None: the script finds both files by itself.

    fill_in: False for a script with several default models, which the help names but the parser does not fill in.
    measures: for a script that evaluates images as the model makes them: no safety check, no watermark.
    """
    add = parser.add_argument
    if config is not None:
        text = f"YAML of the model (default: that of the run in --ckpt, else {config})"
        add("--config", default=config if fill_in else None, metavar="YAML", help=text)
        text = f"weights of the model: a run directory, .ckpt, .safetensors or a diffusers folder (default: {ckpt})"
        add("--ckpt", default=ckpt if fill_in else None, metavar="PATH", help=text)
    add("--use_ema", action=BooleanOptionalAction, help="use the EMA weights, or not (default: as the config says)")
    text = (
        "auto: bf16 if the device supports it, else full. full: float32. autocast: float32 weights, computed in half "
        "precision. bf16, fp16: 16-bit weights (default: auto)"
    )
    add("--precision", choices=PRECISIONS, default="auto", help=text)
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps")
    text = "weights of linear layers in 8 or 4 bits, which saves memory; needs torchao (default: as --precision says)"
    add("--quantize", choices=QUANTIZATIONS, help=text)
    text = f"compile the UNet with this backend of torch.compile, once a size (default of the flag: {COMPILERS[0]})"
    add("--compile", nargs="?", const=COMPILERS[0], choices=COMPILERS, metavar="BACKEND", help=text)
    text = "keep the text encoder, the first stage or both on the CPU while they are not in use (CUDA only); all: also "
    add("--offload", choices=OFFLOADS, help=f"{text}the network while they are (default: off)")
    if measures:
        parser.set_defaults(safety="off", safety_checker=None, watermark="off")
    else:
        _add_output_flags(parser)
    text = "add a LoRA file with this strength (default: 1; negative for its opposite); repeat it for several files"
    add("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help=text)
    text = "add the token of a textual inversion file to prompts, as its file or TOKEN names it; may be repeated"
    add("--embedding", action="append", default=[], metavar="FILE[:TOKEN]", help=text)
    text = "merged: add each --lora to the weights; live: leave them apart, which costs time in every step"
    add("--lora_mode", choices=LORA_MODES, default=LORA_MODES[0], help=text)
    text = "allow the config to name classes of this package"
    add("--allow-targets", action="append", default=[], metavar="PACKAGE", help=text)
    add("--debug", action="store_true", help="show the traceback of an error")


def _add_output_flags(parser: Parser) -> None:
    add = parser.add_argument
    text = "on: replace images that the safety checker flags by black ones; report: keep and mark them; off: no check"
    add("--safety", choices=SAFETY_MODES, help=f"{text} (default: the config's)")
    text = (
        "folder with the checker's config.json and weights (default: models/safety_checker, else the Hugging Face hub)"
    )
    add("--safety_checker", metavar="FOLDER", help=text)
    text = f"invisible watermark in images of at least 256x256 pixels (default: {METHODS[0]})"
    add("--watermark", choices=(*METHODS, "off"), help=text)


# --- checks


class Prepared(NamedTuple):
    """Everything that a run needs, checked."""

    info: ModelInfo
    weights: inference.WeightsSource
    watermark: Watermark | None
    safety: Safety
    lora: list[tuple[Path, float]]
    embeddings: list[tuple[Path, str | None]]


def read_info(opt: Namespace) -> ModelInfo:
    """The facts of the model in `--config`; without the flag, of the run in `--ckpt`, which becomes its checkpoint."""
    run = inference.run_of(find_file(opt.ckpt))
    if run is None:
        return read_model_info(find_file(opt.config))
    opt.ckpt = str(run.ckpt)
    return read_model_info(find_file(opt.config) if "config" in opt.given else run.configs)


def prepare(opt: Namespace, info: ModelInfo, ckpt: Path | None = None) -> Prepared:
    """The last checks before the model is loaded: grid, weights (default: `--ckpt`), device, safety checker."""
    if getattr(opt, "n_rows", 0) < 0:
        raise ValueError(f"--n_rows {opt.n_rows}: choose 1 or more, or 0 for n_samples")
    if opt.watermark not in (None, "off") and find_spec("imwatermark") is None:
        raise ImportError(f"--watermark {opt.watermark}: pip install invisible-watermark")
    if opt.quantize is not None:
        check_quantize(opt.quantize)
    lora = [parse_lora(text) for text in opt.lora]
    embeddings = [parse_embedding(text) for text in opt.embedding]
    if opt.lora_mode != LORA_MODES[0] and not lora and value_at(info.config, "model", "params", "adapters") is None:
        raise ValueError(f"--lora_mode {opt.lora_mode}: there is no LoRA; add --lora FILE, or remove the flag")
    if embeddings and not info.takes_text:
        raise ValueError(f"--embedding {opt.embedding[0]}: this model is not text-conditional; remove the flag")
    weights = _open_weights(opt, ckpt)
    if getattr(opt, "recorded", None) is not None:
        check_unchanged(opt, info, weights)
    device = inference.choose_device(opt.device)
    if getattr(opt, "n_samples", None) == AUTO:
        network = info.unet_name
        require(network == "UNetModel", f"--n_samples {AUTO}: the memory of a {network} is unknown; pass a number")
        inference.known_free_memory(device)
    if opt.offload is not None:
        check_offload(opt.offload, device.type, opt.compile)
    if opt.compile is not None:
        check_compiler(opt.compile, device.type)
        if getattr(opt, "controlnet", None):
            raise ValueError(f"--compile {opt.compile}: not supported with --controlnet; remove one of them")
        if opt.deep_cache > 1 or opt.token_merging > 0.0:
            raise ValueError(
                "--compile with --deep_cache or --token_merging: not supported together; remove one of them"
            )
    if opt.quantize is not None:
        inference.check_quantization(opt.quantize, device, opt.precision)
    inference.allow_targets(*opt.allow_targets)
    watermark = None if opt.watermark == "off" else Watermark(opt.watermark or METHODS[0])
    safety = SafetySettings(opt.safety, opt.safety_checker).checked(info)
    return Prepared(info, weights, watermark, Safety(safety).ready(), lora, embeddings)


def _open_weights(opt: Namespace, ckpt: Path | None) -> inference.WeightsSource:
    if ckpt is None:
        ckpt = _find_released(opt.ckpt) if opt.ckpt in _RELEASED else find_file(opt.ckpt)
    if not ckpt.exists():  # checked here, before torch is imported
        hint = _DOWNLOADS.get(getattr(opt, "ckpt", ""), "a training run has <run directory>/checkpoints/last.ckpt")
        raise FileNotFoundError(f"checkpoint {ckpt}: no such file; {hint}, or pass --ckpt FILE with its --config")
    if command_line.only_samples and opt.device in ("cpu", "auto") and not (opt.device == "auto" and has_gpu()):
        reserve_memory(cast_bytes(ckpt, opt.precision))
    return inference.open_weights(ckpt)  # imports torch


def has_gpu() -> bool:
    """True if a GPU's driver is loaded, as far as can be seen without torch."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def cast_bytes(ckpt: Path, precision: str) -> int:
    """Bytes of the weights that loading on the CPU makes of a float16 .safetensors file; 0 for what it may map."""
    if not ckpt.is_file() or ckpt.suffix != ".safetensors" or precision == "fp16":
        return 0
    with ckpt.open("rb") as file:
        header = file.read(1 << 12)  # its first entries
    return ckpt.stat().st_size * (2 if precision in ("full", "autocast") else 1) if b'"dtype":"F16"' in header else 0


def _find_released(path: str) -> Path:
    """The checkpoint of a released model, which archives name last.ckpt or model.ckpt."""
    other = {"last.ckpt": "model.ckpt", "model.ckpt": "last.ckpt"}[Path(path).name]
    names = [find_file(path), find_file(Path(path).with_name(other))]
    return next((file for file in names if file.is_file()), names[0])


def find_controlnet(path: str) -> Path:
    """The weights of a `--controlnet` path: a file, a folder of diffusers, or the newest checkpoint of a run."""
    file = find_file(path)
    if not file.exists():
        raise FileNotFoundError(f"--controlnet {path}: no such file or folder; pass the weights of a ControlNet")
    run = inference.run_of(file)
    return file if run is None else run.ckpt


def request_fields(opt: Namespace, request: type[Request], **others: Any) -> dict[str, Any]:
    """The flags' values as fields of a request; `others` are fields that are not the value of a flag."""
    by_model = {"H", "W"} - getattr(opt, "given", frozenset())  # not given: the model's size, or the published one
    given = {RENAMED.get(flag, flag): value for flag, value in vars(opt).items() if flag not in by_model}
    if given.get("n_samples") == AUTO:  # until the model is loaded, see `in_batches`
        del given["n_samples"]
    found = {field.name: given[field.name] for field in fields(request) if field.name in given}
    return {**found, "sampler": opt.sampler or "ddim", **others}


def prompts_of(opt: Namespace) -> str | list[str]:
    """The prompt, the lines of `--from-file`, or those that reproduce the batches of the image in `--from-metadata`."""
    if opt.from_file:
        return inference.read_prompts(opt.from_file)
    recorded = getattr(opt, "recorded", None)
    return opt.prompt or "" if recorded is None else recorded.prompts(opt.prompt or "")


# --- loading


def load(opt: Namespace, prepared: Prepared, **files: Files) -> inference.Pipeline:
    """Load the model; the `files` that images are made from go into the metadata."""
    model = prepared.info, prepared.weights, opt.device, opt.precision, opt.use_ema
    added: dict[str, Any] = {"lora": prepared.lora, "lora_mode": opt.lora_mode, "embeddings": prepared.embeddings}
    added |= {"quantize": opt.quantize, "offload": opt.offload, "compiler": opt.compile}
    pipeline = inference.load_model(*model, **added)
    if hasattr(pipeline.model, "control_model") and "control_image" not in opt:
        logger.warning("%s has a ControlNet, which is not used here; control2img.py uses it", opt.ckpt)
    if prepared.embeddings and "prompt" in opt:
        prompts = prompts_of(opt) if "from_file" in opt else opt.prompt
        prompts = [prompts] if isinstance(prompts, str) else prompts
        inference.warn_unused(pipeline.model.cond_stage_model, [*prompts, opt.negative_prompt or ""])
    pipeline.identity = {**pipeline.identity, **record_files(**files)}
    return pipeline


def in_batches(opt: Namespace, request: R, pipeline: inference.Pipeline, encodes: bool = False) -> R:
    """The request in batches of `--n_samples`, which becomes a number if it is AUTO; encodes: as in `batch_by_memory`.

    The size of a batch is the number of images of one prompt, and so at most the default; of a list it changes none.
    """
    if opt.n_samples == AUTO:
        most = request.n_samples if isinstance(request.prompt, str) else min(MAX_AUTO, len(request.prompt))
        opt.n_samples = inference.batch_by_memory(pipeline, request, most, encodes)
        request = request.in_batches_of(opt.n_samples)
    return request


def record_files(**files: Files) -> dict[str, Any]:
    """Paths and fingerprints of files as metadata; lists of flags that are given several times."""
    record: dict[str, Any] = {}
    for name, path in files.items():
        if isinstance(path, list):
            record |= {name: path, f"{name}_fingerprint": [fingerprint(each) for each in path]}
        elif path:
            record |= {name: str(path), f"{name}_fingerprint": fingerprint(path)}
    return record
