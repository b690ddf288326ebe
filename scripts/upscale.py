"""Enlarge pictures with a super-resolution model: python scripts/upscale.py --init-img small.png."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this script is in, installed or not

from ldm.cli import Parser, run_command
from ldm.inference import fingerprint, load_model, upscale
from ldm.inference.cli import (
    add_model_flags,
    add_sampler_flag,
    add_sampling_flags,
    check_ready,
    open_ckpt,
    released_weights,
    report,
    safety_of,
    watermark_of,
)
from ldm.inference.settings import model_info, read_config
from ldm.inference.task_settings import UpscaleRequest, require_upscaler
from ldm.output.images import NamedOutput
from ldm.paths import find_file

CONFIG, CKPT = "models/ldm/bsr_sr/config.yaml", "models/ldm/bsr_sr/model.ckpt"
WHERE = {CKPT: "bash scripts/download_models.sh sr_bsr brings it"}


def parser() -> Parser:
    parser = Parser(
        prog="upscale.py", description="Draw pictures in a multiple of their size, four times with the released model."
    )
    add = parser.add_argument
    add("--init-img", nargs="+", default=[], metavar="FILE", help="the pictures to enlarge, any size")
    add(
        "--outdir",
        default="outputs/upscale-samples",
        metavar="DIR",
        help="folder for the results, which have the names of the pictures",
    )
    add("--prompt", default="", metavar="TEXT", help="what the pictures show, for models that are led by a prompt")
    add(
        "--negative_prompt",
        default="",
        metavar="TEXT",
        help="what to lead away from, for models that are led by a prompt",
    )
    add("--scale", type=float, help="guidance scale; 1 is none (default: 9 for models that are led by a prompt)")
    text = "noise that is added to the small picture, for models that are told of it; more lets them invent more (default: 20)"
    add("--noise_level", type=int, metavar="N", help=text)
    add(
        "--steps",
        type=int,
        metavar="S",
        help="number of sampling steps (default: 100, and 50 for models that are led by a prompt)",
    )
    text = "noise of the steps: 0 is deterministic (default: 1 with DDIM and a model without a prompt, else the sampler's own)"
    add("--ddim_eta", type=float, metavar="ETA", help=text)
    add_sampler_flag(parser)
    add_sampling_flags(parser)
    text = "side of a tile in pixels of the small picture; what is larger is drawn in overlapping tiles; 0: always in one piece"
    add("--tile", type=int, default=128, metavar="SIDE", help=text)
    add("--seed", type=int, default=42, help="seed of each picture's noise")
    add_model_flags(parser, CONFIG, CKPT)
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    # What is wrong with the command line is said before torch is imported.
    if not opt.init_img:
        raise ValueError("--init-img: give the pictures to enlarge, e.g. --init-img small.png")
    config, ckpt = find_file(opt.config), released_weights(CKPT) if opt.ckpt == CKPT else find_file(opt.ckpt)
    info = model_info(read_config(config))
    require_upscaler(info)
    walk = {name: getattr(opt, name) for name in ("spacing", "guidance_rescale", "dynamic_threshold")}
    same = {
        name: getattr(opt, name)
        for name in ("steps", "seed", "tile", "prompt", "negative_prompt", "scale", "noise_level")
    }
    settings = UpscaleRequest(**same, **walk, eta=opt.ddim_eta, sampler=opt.sampler or "ddim").checked(info)
    from ldm.data.image import load_image

    for path in opt.init_img:
        load_image(path)
    source = open_ckpt(opt, ckpt, WHERE)
    check_ready(opt)
    output = NamedOutput(opt.outdir, watermark_of(opt), safety_of(opt, info))

    from tqdm import tqdm

    pipeline = load_model(config, source, opt.device, opt.precision, opt.use_ema)
    start, files = time.perf_counter(), []
    for path in tqdm(opt.init_img, desc="pictures", unit="picture"):
        picture = upscale(pipeline, load_image(path), settings)
        of = {"init_img": str(path), "init_img_fingerprint": fingerprint(path)}
        files.append(output.save(picture._replace(info={**picture.info, **of}), Path(path).stem))
    report(len(files), time.perf_counter() - start, files)


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
