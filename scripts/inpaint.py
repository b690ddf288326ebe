"""Inpaint the white parts of masks: python scripts/inpaint.py --indir FOLDER --outdir RESULTS (x.png, x_mask.png).

--prompt says what they show, with a Stable Diffusion inpainting model or, less well, any text-to-image model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's checkout, installed or not

from ldm import inference
from ldm.cli import Parser, run_command
from ldm.inference import cli
from ldm.inference.from_metadata import parse_given
from ldm.inference.requests import InpaintRequest
from ldm.output.images import GeneratedImage, NamedOutput

CONFIG, CKPT = "models/ldm/inpainting_big/config.yaml", "models/ldm/inpainting_big/last.ckpt"


def parser() -> Parser:
    text = "Generate what is white in the masks; every other pixel is unchanged."
    parser = Parser(prog="inpaint.py", description=text)
    add = parser.add_argument
    add("--indir", metavar="DIR", help="folder with pairs x.png, x_mask.png; masks are white where x.png is inpainted")
    add("--init-img", action=cli.InputFile, metavar="FILE", help="a single image instead of a folder, with its --mask")
    add(
        "--mask",
        action=cli.InputFile,
        metavar="FILE",
        help="the mask of --init-img, of the same size, white where it is inpainted",
    )
    add("--outdir", metavar="DIR", help="folder for the results, named after the images")
    text = "fade from the image to the generated pixels over this distance from the mask's edge"
    add("--feather", type=int, default=0, metavar="PIXELS", help=text)
    cli.add_single_image_flags(parser, steps=50, scale=7.5)
    cli.add_model_flags(parser, CONFIG, CKPT)
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parse_given(parser(), argv)
    single = opt.init_img is not None or opt.mask is not None
    if single and opt.indir:
        raise ValueError("--indir with --init-img or --mask: pass a folder of pairs or one pair")
    for flag in ("outdir",) if single else ("indir", "outdir"):
        if not getattr(opt, flag):
            raise ValueError(f"--{flag}: pass a folder, e.g. --indir images --outdir results")
    info = cli.read_info(opt)
    request = InpaintRequest(**cli.request_fields(opt, InpaintRequest)).checked(info)
    pairs = inference.one_pair(opt.init_img, opt.mask) if single else inference.find_pairs(opt.indir)
    inference.check_pairs(pairs, info.multiple)
    prepared = cli.prepare(opt, info)
    output = NamedOutput(opt.outdir, prepared.watermark, prepared.safety)

    pipeline = cli.load(opt, prepared)

    def results() -> Iterator[tuple[Path, GeneratedImage]]:
        for path, mask in pairs:
            result = inference.inpaint(pipeline, inference.load_image(path), inference.load_mask(mask), request)
            yield path, result._replace(info={**result.info, **cli.record_files(init_img=path, mask=mask)})

    inference.write_named(results(), len(pairs), output)


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
