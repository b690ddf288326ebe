"""Convert weights: to diffusers' layout and back, or a run to one file: convert.py --ckpt logs/RUN --out model.ckpt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout of this script, installed or not

from argparse import BooleanOptionalAction, Namespace

from ldm.cli import Parser, run_command
from ldm.config.instantiate import allow_targets
from ldm.config.model_info import model_info, read_config
from ldm.inference.cli import SD_CONFIG
from ldm.inference.runs import run_of
from ldm.paths import find_file

DESCRIPTION = """Convert a weights file to a diffusers folder or back; diffusers need not be installed.

--ckpt a file (.ckpt, .safetensors, *.index.json of shards) or a run directory: --out is the folder to create, or a
.ckpt or .safetensors file: all weights in one file under the published keys, as from a sharded run (--strategy fsdp).
--ckpt a folder (a pipeline, a UNet, a first stage or a ControlNet): --out is the .ckpt or .safetensors file to create.
--config is the YAML of the model: Stable Diffusion v1, v2 or inpainting, unconditional or class-conditional latent
diffusion, a KL or VQ first stage, or a ControlNet with its model, of which the ControlNet is converted. Every block is
computed on both sides and compared before anything is written; existing files are never overwritten.

--lora a LoRA file, or the folder that peft wrote: --out is the .safetensors file to create, in the names of kohya's
scripts or of diffusers (--lora_format).

--embedding a textual inversion file: --out is the .safetensors, .pt or .bin file to create, in the layout of diffusers
or of AUTOMATIC1111's web UI (--embedding_format)."""
SOURCES = {  # flag -> the sources that it is for
    "config": ("ckpt", "lora"),
    "allow_targets": ("ckpt", "lora"),
    "dtype": ("ckpt",),
    "use_ema": ("ckpt",),
    "scheduler": ("ckpt",),
    "lora_format": ("lora",),
    "embedding_format": ("embedding",),
}


def parser() -> Parser:
    parser = Parser(prog="convert.py", description=DESCRIPTION)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", metavar="PATH", help="weights file or diffusers folder")
    source.add_argument("--lora", metavar="PATH", help="LoRA file or folder, of any of the formats")
    source.add_argument("--embedding", metavar="FILE", help="textual inversion file, of any of the layouts")
    add("--lora_format", choices=("kohya", "diffusers"), help="names of the written LoRA (default: kohya)")
    add(
        "--embedding_format",
        choices=("diffusers", "a1111"),
        help="layout of the written embedding (default: diffusers)",
    )
    text = "folder, or .ckpt or .safetensors file, to create; must not exist"
    add("--out", required=True, metavar="PATH", help=text)
    add("--config", metavar="YAML", help=f"config of the model (default: the folder's or run's, else {SD_CONFIG})")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="precision of the written weights (default: unchanged)")
    text = "convert the EMA weights of a file instead of the trained ones (default: as in the config)"
    add("--use_ema", action=BooleanOptionalAction, help=text)
    add("--scheduler", choices=("ddim", "pndm"), help="sampler of the folder; pndm is PLMS (default: ddim)")
    text = "let the config reference classes of this package too"
    add("--allow-targets", action="append", default=[], metavar="PACKAGE", help=text)
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    path, target = find_file(opt.ckpt or opt.lora or opt.embedding), Path(opt.out)
    if target.exists():
        raise ValueError(f"--out {target}: already exists; choose another name or remove it first")
    for flag, sources in SOURCES.items():
        if getattr(opt, flag) not in (None, []) and not any(getattr(opt, source) for source in sources):
            raise ValueError(f"--{flag}: only for {' and '.join(f'--{source}' for source in sources)}")
    allow_targets(*opt.allow_targets)
    if opt.lora:
        _convert_lora(opt, path, target)
        return
    if opt.embedding:
        _convert_embedding(opt, path, target)
        return
    # Imported here because they bring torch, which --help does not need.
    from ldm.checkpoint.diffusers.plan import plan_of
    from ldm.checkpoint.diffusers.write import WEIGHTS
    from ldm.checkpoint.source import DiffusersFolder, open_weights
    from ldm.convert.convert import to_file, to_folder, to_one_file

    run = run_of(path)
    source = open_weights(run.ckpt if run else path)
    from_folder = isinstance(source, DiffusersFolder)
    if not from_folder and target.suffix in WEIGHTS:
        for flag in ("config", "scheduler"):
            if getattr(opt, flag) is not None:
                raise ValueError(f"--{flag}: only for converting from or to a diffusers folder, but --out is a file")
        count = to_one_file(source, target, opt.dtype, bool(opt.use_ema))
        print(f"{count} tensors\n{target}")
        return
    for flag in ("use_ema", "scheduler") if from_folder else ():
        if getattr(opt, flag) is not None:
            raise ValueError(f"--{flag}: only for converting a file to a folder, but --ckpt {path} is a folder")
    own = path / "config.yaml"
    if run is not None and opt.config is None:
        config = read_config(run.configs)
    else:
        config = read_config(
            own if from_folder and opt.config is None and own.is_file() else find_file(opt.config or SD_CONFIG)
        )
    scheduler = opt.scheduler or "ddim"
    if opt.scheduler is not None and plan_of(config, scheduler).scheduler is None:
        raise ValueError(f"--scheduler {opt.scheduler}: this model is converted without a scheduler; remove the flag")
    if from_folder:
        done = to_file(config, path, target, opt.dtype)
    else:
        use_ema = opt.use_ema
        if use_ema is None:
            use_ema = "unet_config" in config.model.params and model_info(config).use_ema
        done = to_folder(config, source, target, opt.dtype, use_ema, scheduler)
    print(f"{done.tensors} tensors in {done.seconds:.1f} s, largest block difference {done.worst:.1e}\n{done.target}")


def _convert_lora(opt: Namespace, path: Path, target: Path) -> None:
    from ldm.convert.lora import convert_lora  # it brings torch

    done = convert_lora(read_config(find_file(opt.config or SD_CONFIG)), path, target, opt.lora_format or "kohya")
    print(f"{done.layers} layers in {done.seconds:.1f} s\n{done.target}")


def _convert_embedding(opt: Namespace, path: Path, target: Path) -> None:
    from ldm.checkpoint.diffusers.embeddings import convert_embedding  # it brings torch

    token, vectors = convert_embedding(path, target, opt.embedding_format or "diffusers")
    print(f"{token}: {len(vectors)} vectors\n{target}")


if __name__ == "__main__":
    sys.exit(run_command(main))
