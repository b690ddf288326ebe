"""Pictures from prompts, e.g. python scripts/txt2img.py --prompt "a photograph of an astronaut riding a horse"."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this script is in, installed or not

from ldm.cli import Parser, run_command
from ldm.inference import load_model, text_to_image
from ldm.inference.cli import (
    STABLE_DIFFUSION,
    add_model_flags,
    add_prompt_flags,
    add_sampler_flag,
    add_sampling_flags,
    add_text_flags,
    check_ready,
    open_ckpt,
    prompt_settings,
    prompts_of,
    safety_of,
    watermark_of,
    write_images,
)
from ldm.inference.from_metadata import add_redraw_flag, check_unchanged, parse
from ldm.inference.prompt_weights import check_emphasis
from ldm.inference.settings import TextToImageRequest, model_info, read_config, require_text_model
from ldm.output.images import Output
from ldm.paths import find_file

DEFAULTS = {**STABLE_DIFFUSION, "outdir": "outputs/txt2img-samples"}
LAION400M = {
    "config": "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    "ckpt": "models/ldm/text2img-large/model.ckpt",
    "outdir": "outputs/txt2img-samples-laion400m",
}


def parser() -> Parser:
    parser = Parser(prog="txt2img.py", description="Draw pictures from prompts with a latent diffusion model.")
    add_prompt_flags(parser, scale=7.5, n_iter=2, n_samples=3)
    add = parser.add_argument
    add("--outdir", metavar="DIR", help=f"folder for samples/ and grids (default: {DEFAULTS['outdir']})")
    add("--H", type=int, default=512, help="height of the pictures in pixels")
    add("--W", type=int, default=512, help="width of the pictures in pixels")
    solver = parser.add_mutually_exclusive_group()
    solver.add_argument("--plms", action="store_true", help="use PLMS instead of DDIM")
    solver.add_argument("--dpm_solver", action="store_true", help="use DPM-Solver++ instead of DDIM")
    add_sampler_flag(solver)
    add_sampling_flags(parser)
    add_text_flags(parser)
    add_redraw_flag(parser)
    add(
        "--laion400m",
        action="store_true",
        help="config, checkpoint and folder of the LAION-400M model, where not given",
    )
    add("--seed", type=int, default=42, help="seed of the noise")
    add_model_flags(parser, DEFAULTS["config"], DEFAULTS["ckpt"], fill_in=False)
    return parser


def settings_of(opt: Namespace) -> TextToImageRequest:
    sampler = "plms" if opt.plms else "dpm_solver" if opt.dpm_solver else opt.sampler or "ddim"
    return TextToImageRequest(**prompt_settings(opt), sampler=sampler, height=opt.H, width=opt.W)


def main(argv: Sequence[str]) -> None:
    opt = parse(parser, argv, "txt2img")
    for name, value in (LAION400M if opt.laion400m else DEFAULTS).items():
        setattr(opt, name, getattr(opt, name) or value)
    # What is wrong with the command line is said before torch is imported.
    config, ckpt = find_file(opt.config), find_file(opt.ckpt)
    info = model_info(read_config(config))
    require_text_model(info)
    settings = settings_of(opt).checked(info)
    prompts = prompts_of(opt)
    if settings.emphasis:
        check_emphasis(prompts)
    source = open_ckpt(opt, ckpt)
    check_unchanged(opt, config, source)
    check_ready(opt)
    output = Output(opt.outdir, watermark_of(opt), safety_of(opt, info))

    pipeline = load_model(config, source, opt.device, opt.precision, opt.use_ema)
    only = opt.recorded.only if opt.recorded is not None else None
    write_images(text_to_image(pipeline, prompts, settings, only=only), output, opt)


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
