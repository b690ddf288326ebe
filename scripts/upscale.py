"""Upscale images with a super-resolution model: python scripts/upscale.py --init-img small.png."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's checkout, installed or not

from ldm import inference
from ldm.cli import Parser, run_command
from ldm.inference import cli
from ldm.inference.from_metadata import parse_given
from ldm.inference.requests import UpscaleRequest
from ldm.output.images import GeneratedImage, NamedOutput

CONFIG, CKPT = "models/ldm/bsr_sr/config.yaml", "models/ldm/bsr_sr/model.ckpt"


def parser() -> Parser:
    text = "Upscale images with a super-resolution model, four times with the released one."
    parser = Parser(prog="upscale.py", description=text)
    add = parser.add_argument
    add("--init-img", nargs="+", action="extend", default=[], metavar="FILE", help="the images, of any size")
    text = "folder for the results, named after the images"
    add("--outdir", default="outputs/upscale-samples", metavar="DIR", help=text)
    text = "noise added to the input, for models with noise-level conditioning; more invents more detail (default: 20)"
    add("--noise_level", type=int, metavar="N", help=text)
    cli.add_single_image_flags(parser, steps=None, scale=9.0)
    text = "side of a tile in input pixels; larger images are processed in overlapping tiles; 0 disables tiling"
    add("--tile", type=int, default=128, metavar="SIDE", help=text)
    cli.add_model_flags(parser, CONFIG, CKPT)
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parse_given(parser(), argv)
    if not opt.init_img:
        raise ValueError("--init-img: pass the images to upscale, e.g. --init-img small.png")
    info = cli.read_info(opt)
    request = UpscaleRequest(**cli.request_fields(opt, UpscaleRequest)).checked(info)
    for path in opt.init_img:
        inference.check_image(path, "--init-img", info.latent_multiple)
    prepared = cli.prepare(opt, info)
    output = NamedOutput(opt.outdir, prepared.watermark, prepared.safety)

    pipeline = cli.load(opt, prepared)

    def results() -> Iterator[tuple[Path, GeneratedImage]]:
        for path in opt.init_img:
            result = inference.upscale(pipeline, inference.load_image(path), request)
            yield Path(path), result._replace(info={**result.info, **cli.record_files(init_img=path)})

    inference.write_named(results(), len(opt.init_img), output)


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
