"""Images from an image and a prompt: python scripts/img2img.py --init-img sketch.png --prompt "a landscape"."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's checkout, installed or not

from ldm import inference
from ldm.cli import Parser, run_command
from ldm.inference import cli
from ldm.inference.from_metadata import add_from_metadata_flag, parse
from ldm.inference.requests import ImageToImageRequest
from ldm.output.images import Output


def parser() -> Parser:
    text = "Generate images from an image and prompts with a latent diffusion model."
    parser = Parser(prog="img2img.py", description=text)
    add = parser.add_argument
    text = "the image to start from, of any size (resized to the nearest size that the model takes)"
    add("--init-img", action=cli.InputFile, metavar="FILE", help=text)
    text = "how much to change: 0 keeps the image, 1 ignores it; strength * ddim_steps steps are run"
    add("--strength", type=float, default=0.75, help=text)
    text = "for a depth model: a depth map (near is bright), or a folder with transformers' DPT, which estimates it"
    add("--depth", action=cli.InputFile, metavar="FILE|DIR", help=text)
    cli.add_prompt_flags(parser, scale=5.0, n_iter=1, n_samples=2)
    add("--outdir", default="outputs/img2img-samples", metavar="DIR", help="folder for samples/ and grids")
    add("--plms", action="store_true", help="not supported, as published; use --sampler plms")
    cli.add_sampler_flag(parser)
    cli.add_sampling_flags(parser)
    add_from_metadata_flag(parser)
    cli.add_model_flags(parser, cli.SD_CONFIG, cli.SD_CKPT)
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parse(parser, argv, "img2img")
    if opt.plms:
        raise ValueError("--plms: not supported by img2img, as published; use --sampler plms")
    if not opt.init_img:
        raise ValueError("--init-img: pass the image to start from, e.g. --init-img sketch.png")
    info = cli.read_info(opt)
    request = ImageToImageRequest(
        **cli.request_fields(opt, ImageToImageRequest, prompt=cli.prompts_of(opt), depth=bool(opt.depth))
    )
    image = inference.check_image(opt.init_img, "--init-img", info.multiple)
    request = request.fitted(image.height, image.width, info).checked(info)
    depth = inference.find_depth(opt.depth, image.size) if opt.depth else None
    prepared = cli.prepare(opt, info)
    output = Output(opt.outdir, prepared.watermark, prepared.safety)

    pipeline = cli.load(opt, prepared, init_img=opt.init_img, depth=opt.depth)
    request = cli.in_batches(opt, request, pipeline, request.seed_mode == "batch")
    inference.write_images(inference.image_to_image(pipeline, image, request, depth, only=opt.only), output, opt)


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
