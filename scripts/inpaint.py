"""Fill the white parts of masks: python scripts/inpaint.py --indir FOLDER --outdir RESULTS, for pairs x.png, x_mask.png.

With the config and weights of a Stable Diffusion inpainting model a --prompt says what is to be seen there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this script is in, installed or not

from ldm.cli import Parser, run_command
from ldm.inference import fingerprint, inpaint, load_model
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
from ldm.inference.task_settings import InpaintRequest, find_pairs, require_inpainting_model, the_pair
from ldm.output.images import NamedOutput
from ldm.paths import find_file

CONFIG, CKPT = "models/ldm/inpainting_big/config.yaml", "models/ldm/inpainting_big/last.ckpt"
WHERE = {CKPT: "bash scripts/download_models.sh inpainting_big brings it"}


def parser() -> Parser:
    parser = Parser(
        prog="inpaint.py", description="Draw anew what is white in the masks; every other pixel stays as it is."
    )
    add = parser.add_argument
    add(
        "--indir",
        metavar="DIR",
        help="folder with pairs x.png, x_mask.png; a mask is white where x.png is to be filled",
    )
    add("--init-img", metavar="FILE", help="one picture instead of a folder, with its --mask")
    add("--mask", metavar="FILE", help="the mask of --init-img, of the same size, white where it is to be filled")
    add("--outdir", metavar="DIR", help="folder for the results, which have the names of the pictures")
    add("--prompt", default="", metavar="TEXT", help="what to draw, for models that are led by a prompt")
    add(
        "--negative_prompt",
        default="",
        metavar="TEXT",
        help="what to lead away from, for models that are led by a prompt",
    )
    add("--scale", type=float, help="guidance scale; 1 is none (default: 7.5 for models that are led by a prompt)")
    add(
        "--feather",
        type=int,
        default=0,
        metavar="PIXELS",
        help="let the drawing fade in over so many pixels from the hole's edge",
    )
    add("--steps", type=int, default=50, metavar="S", help="number of sampling steps")
    add_sampler_flag(parser)
    add_sampling_flags(parser)
    add(
        "--ddim_eta",
        type=float,
        metavar="ETA",
        help="noise of the steps (default: 0 with DDIM, else the sampler's own)",
    )
    add("--seed", type=int, default=42, help="seed of each picture's noise")
    add_model_flags(parser, CONFIG, CKPT)
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    # What is wrong with the command line is said before torch is imported.
    single = opt.init_img is not None or opt.mask is not None
    if single and opt.indir:
        raise ValueError("--indir with --init-img or --mask: give a folder of pairs or one pair")
    for flag in ("outdir",) if single else ("indir", "outdir"):
        if not getattr(opt, flag):
            raise ValueError(f"--{flag}: give a folder, e.g. --indir pictures --outdir results")
    config, ckpt = find_file(opt.config), released_weights(CKPT) if opt.ckpt == CKPT else find_file(opt.ckpt)
    info = model_info(read_config(config))
    require_inpainting_model(info)
    walk = {name: getattr(opt, name) for name in ("spacing", "guidance_rescale", "dynamic_threshold")}
    same = {name: getattr(opt, name) for name in ("steps", "seed", "prompt", "negative_prompt", "scale", "feather")}
    settings = InpaintRequest(**same, **walk, eta=opt.ddim_eta, sampler=opt.sampler or "ddim").checked(info)
    from ldm.data.image import EXTENSIONS, load_image

    pairs = the_pair(opt.init_img, opt.mask) if single else find_pairs(opt.indir, EXTENSIONS)
    for picture, mask in pairs:
        sizes = [load_image(path).size for path in (picture, mask)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{mask} is {sizes[1][0]}x{sizes[1][1]} pixels, {picture} {sizes[0][0]}x{sizes[0][1]}: they must be alike"
            )
    source = open_ckpt(opt, ckpt, WHERE)
    check_ready(opt)
    output = NamedOutput(opt.outdir, watermark_of(opt), safety_of(opt, info))

    from tqdm import tqdm

    pipeline = load_model(config, source, opt.device, opt.precision, opt.use_ema)
    start, files = time.perf_counter(), []
    for path, mask in tqdm(pairs, desc="pictures", unit="picture"):
        # What is transparent in a mask is kept, so that it is laid over black.
        picture = inpaint(pipeline, load_image(path), load_image(mask, background=(0, 0, 0)), settings)
        of = {
            "init_img": str(path),
            "init_img_fingerprint": fingerprint(path),
            "mask": str(mask),
            "mask_fingerprint": fingerprint(mask),
        }
        files.append(output.save(picture._replace(info={**picture.info, **of}), path.stem))
    report(len(files), time.perf_counter() - start, files)


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
