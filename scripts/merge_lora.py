"""A checkpoint with LoRA merged in: merge_lora.py --ckpt sd-v1-4.ckpt --lora style.safetensors:0.8 --out new.ckpt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout of this script, installed or not

from ldm.cli import Parser, run_command
from ldm.config.instantiate import allow_targets
from ldm.config.model_info import read_config
from ldm.inference.cli import SD_CONFIG
from ldm.inference.runs import run_of
from ldm.inference.settings import parse_lora
from ldm.paths import find_file


def parser() -> Parser:
    text = "Write a checkpoint that gives the images of --ckpt with --lora. Existing files are never overwritten."
    parser = Parser(prog="merge_lora.py", description=text)
    add = parser.add_argument
    text = "weights: a run directory (its own LoRA is merged too), .ckpt, .safetensors or a diffusers folder"
    add("--ckpt", required=True, metavar="PATH", help=text)
    text = "LoRA to merge with this strength (default: 1); repeat it for several files"
    add("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help=text)
    add("--out", required=True, metavar="PATH", help=".ckpt or .safetensors file to create; must not exist")
    add("--config", metavar="YAML", help=f"config of the model (default: that of the run in --ckpt, else {SD_CONFIG})")
    text = "let the config reference classes of this package too"
    add("--allow-targets", action="append", default=[], metavar="PACKAGE", help=text)
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    target, files = Path(opt.out), [parse_lora(text) for text in opt.lora]
    if target.exists():
        raise ValueError(f"--out {target}: already exists; choose another name or remove it first")
    ckpt = find_file(opt.ckpt)
    run = run_of(ckpt)
    config = read_config(run.configs if run and opt.config is None else find_file(opt.config or SD_CONFIG))
    # Imported here because it brings torch, which --help does not need.
    from ldm.convert.lora import merge_lora

    allow_targets(*opt.allow_targets)
    done = merge_lora(config, run.ckpt if run else ckpt, files, target)
    print(f"{done.layers} layers changed in {done.seconds:.1f} s\n{done.target}")


if __name__ == "__main__":
    sys.exit(run_command(main))
