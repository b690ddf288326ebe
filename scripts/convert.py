"""Weights to a diffusers folder and back, e.g. python scripts/convert.py --ckpt sd-v1-4.ckpt --out sd-v1-4-diffusers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this script is in, installed or not

from argparse import BooleanOptionalAction

from ldm.cli import Parser, run_command
from ldm.inference.settings import model_info, read_config
from ldm.paths import find_file

CONFIG = "configs/stable-diffusion/v1-inference.yaml"
DESCRIPTION = """Turn a weights file into a diffusers folder, or a diffusers folder into a weights file; diffusers need not be installed.

--ckpt a file (.ckpt, .safetensors, *.index.json of shards): --out is the folder to make.
--ckpt a folder (of a pipeline, a UNet or a first stage): --out is the .ckpt or .safetensors file to make.
--config is the YAML of the model: Stable Diffusion v1, v2, inpainting, unconditional or class-conditional latent diffusion, or a KL or VQ
first stage. The converted blocks are computed both ways and compared before anything is written; what exists is never overwritten."""


def parser() -> Parser:
    parser = Parser(prog="convert.py", description=DESCRIPTION)
    add = parser.add_argument
    add("--ckpt", required=True, metavar="PATH", help="the weights file, or the diffusers folder")
    add(
        "--out",
        required=True,
        metavar="PATH",
        help="the folder, or the .ckpt or .safetensors file, to make; it must not exist",
    )
    add("--config", metavar="YAML", help=f"the model's config (default: config.yaml in the folder, else {CONFIG})")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="precision of the weights to write (default: as they are)")
    text = "take the averaged weights of a file, or the trained ones (default: as the config says)"
    add("--use_ema", action=BooleanOptionalAction, help=text)
    add("--scheduler", choices=("ddim", "pndm"), help="the sampler that the folder names; pndm is PLMS (default: ddim)")
    add(
        "--allow-targets",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="let the config name classes of this package too",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    # What is wrong with the command line is said before torch is imported.
    source, target = find_file(opt.ckpt), Path(opt.out)
    if not source.exists():
        raise FileNotFoundError(f"--ckpt {source}: no such file or folder")
    if target.exists():
        raise ValueError(f"--out {target}: already exists; choose another name or remove it first")
    for flag in ("use_ema", "scheduler") if source.is_dir() else ():
        if getattr(opt, flag) is not None:
            raise ValueError(
                f"--{flag}: says how a folder is made of a file, and --ckpt {source} is a folder; leave it out"
            )
    own = source / "config.yaml"
    config = read_config(own if opt.config is None and own.is_file() else find_file(opt.config or CONFIG))
    if opt.allow_targets:
        from ldm.config.instantiate import allow_targets

        allow_targets(*opt.allow_targets)
    from ldm.checkpoint.diffusers.plan import plan_of

    scheduler = opt.scheduler or "ddim"
    plan = plan_of(config, scheduler)  # a model that diffusers has no class for is refused here
    if opt.scheduler is not None and plan.scheduler is None:
        raise ValueError(f"--scheduler {opt.scheduler}: a first stage alone has none; leave it out")
    from ldm.convert.convert import to_file, to_folder

    if source.is_dir():
        done = to_file(config, source, target, opt.dtype)
    else:
        use_ema = (
            opt.use_ema
            if opt.use_ema is not None
            else "unet_config" in config.model.params and model_info(config).use_ema
        )
        done = to_folder(config, source, target, opt.dtype, use_ema, scheduler)
    print(
        f"{done.tensors} tensors in {done.seconds:.1f} s, blocks within {done.worst:.1e} of each other\n{done.target}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
