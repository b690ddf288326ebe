"""Images from prompts, e.g. python scripts/txt2img.py --prompt "a photograph of an astronaut riding a horse"."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's checkout, installed or not

from ldm import inference
from ldm.cli import Parser, run_command
from ldm.inference import cli
from ldm.inference.from_metadata import add_from_metadata_flag, parse
from ldm.inference.requests import TextToImageRequest
from ldm.output.images import Output
from ldm.published import published_names

__getattr__ = published_names("scripts.txt2img", __name__)

DEFAULTS = {"config": cli.SD_CONFIG, "ckpt": cli.SD_CKPT, "outdir": "outputs/txt2img-samples"}
LAION400M = {
    "config": "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    "ckpt": "models/ldm/text2img-large/model.ckpt",
    "outdir": "outputs/txt2img-samples-laion400m",
}


def parser() -> Parser:
    parser = Parser(prog="txt2img.py", description="Generate images from prompts with a latent diffusion model.")
    cli.add_prompt_flags(parser, scale=7.5, n_iter=2, n_samples=3)
    add = parser.add_argument
    add("--outdir", metavar="DIR", help=f"folder for samples/ and grids (default: {DEFAULTS['outdir']})")
    cli.add_size_flags(parser, 512)
    solver = parser.add_mutually_exclusive_group()
    solver.add_argument("--plms", action="store_true", help="the same as --sampler plms")
    solver.add_argument("--dpm_solver", action="store_true", help="the same as --sampler dpm_solver (DPM-Solver++)")
    cli.add_sampler_flag(solver)
    cli.add_sampling_flags(parser)
    add_from_metadata_flag(parser)
    add("--laion400m", action="store_true", help="use the LAION-400M model's --config, --ckpt and --outdir by default")
    cli.add_model_flags(parser, DEFAULTS["config"], DEFAULTS["ckpt"], fill_in=False)
    return parser


def request_of(opt: Namespace) -> TextToImageRequest:
    sampler = "plms" if opt.plms else "dpm_solver" if opt.dpm_solver else opt.sampler or "ddim"
    return TextToImageRequest(
        **cli.request_fields(opt, TextToImageRequest, sampler=sampler, prompt=cli.prompts_of(opt))
    )


def main(argv: Sequence[str]) -> None:
    opt = parse(parser, argv, "txt2img")
    for name, value in (LAION400M if opt.laion400m else DEFAULTS).items():
        setattr(opt, name, getattr(opt, name) or value)
    info = cli.read_info(opt)
    request = request_of(opt).checked(info)
    prepared = cli.prepare(opt, info)
    output = Output(opt.outdir, prepared.watermark, prepared.safety)

    pipeline = cli.load(opt, prepared)
    request = cli.in_batches(opt, request, pipeline)
    inference.write_images(inference.text_to_image(pipeline, request, only=opt.only), output, opt)


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
