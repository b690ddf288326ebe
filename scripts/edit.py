"""Edit an image by an instruction: python scripts/edit.py --init-img photo.png --prompt "make it winter"."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's checkout, installed or not

from ldm import inference
from ldm.cli import Parser, run_command
from ldm.inference import cli
from ldm.inference.from_metadata import add_from_metadata_flag, parse
from ldm.inference.requests import EditRequest
from ldm.output.images import Output


def parser() -> Parser:
    parser = Parser(prog="edit.py", description="Edit an image by instructions with an InstructPix2Pix model.")
    add = parser.add_argument
    add("--init-img", action=cli.InputFile, metavar="FILE", help="the image to edit, of any size")
    text = "guidance by the image: more keeps more of it; 1 disables it"
    add("--image-scale", type=float, default=1.5, metavar="SCALE", help=text)
    text = "scale larger images down to as many pixels as a square of this side (default: that of training)"
    add("--resolution", type=int, metavar="SIDE", help=text)
    content = 'the instruction, e.g. "make it winter"'
    cli.add_prompt_flags(parser, scale=7.5, n_iter=1, n_samples=1, prompt=None, content=content)
    add("--outdir", default="outputs/edit-samples", metavar="DIR", help="folder for samples/ and grids")
    cli.add_sampler_flag(parser)
    cli.add_sampling_flags(parser)
    add_from_metadata_flag(parser)
    cli.add_model_flags(parser, cli.EDIT_CONFIG, cli.EDIT_CKPT)
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parse(parser, argv, "edit")
    if not opt.init_img:
        raise ValueError("--init-img: pass the image to edit, e.g. --init-img photo.png")
    if not (opt.prompt or opt.from_file):
        raise ValueError('--prompt: pass an instruction, e.g. --prompt "make it winter"')
    info = cli.read_info(opt)
    request = EditRequest(**cli.request_fields(opt, EditRequest, prompt=cli.prompts_of(opt)))
    image = inference.check_image(opt.init_img, "--init-img", info.multiple)
    request = request.fitted(image.height, image.width, info).checked(info)
    prepared = cli.prepare(opt, info)
    output = Output(opt.outdir, prepared.watermark, prepared.safety)

    pipeline = cli.load(opt, prepared, init_img=opt.init_img)
    request = cli.in_batches(opt, request, pipeline)
    inference.write_images(inference.edit(pipeline, image, request, only=opt.only), output, opt)


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
