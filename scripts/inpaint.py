"""Fill the white parts of masks: python scripts/inpaint.py --indir FOLDER --outdir RESULTS, for pairs x.png, x_mask.png."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this script is in, installed or not

from ldm.commandline import Parser, find_file, run
from ldm.inference import fill, load_model
from ldm.pictures import NamedOutput
from ldm.scripting import add_model_flags, check_ready, released_weights, report, safety_of, watermark_of
from ldm.settings import model_facts, read_config
from ldm.task_settings import FillSettings, check_fills_masks, find_pairs

CONFIG, CKPT = "models/ldm/inpainting_big/config.yaml", "models/ldm/inpainting_big/last.ckpt"
WHERE = {CKPT: "bash scripts/download_models.sh inpainting_big brings it"}


def parser() -> Parser:
    parser = Parser(prog="inpaint.py", description="Draw anew what is white in the masks; every other pixel stays as it is.")
    add = parser.add_argument
    add("--indir", metavar="DIR", help="folder with pairs x.png, x_mask.png; a mask is white where x.png is to be filled")
    add("--outdir", metavar="DIR", help="folder for the results, which have the names of the pictures")
    add("--steps", type=int, default=50, metavar="S", help="number of DDIM steps")
    add("--ddim_eta", type=float, default=0.0, metavar="ETA", help="noise of DDIM: 0 is deterministic")
    add("--seed", type=int, default=42, help="seed of each picture's noise")
    add_model_flags(parser, CONFIG, CKPT)
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    # What is wrong with the command line is said before torch is imported.
    for flag in ("indir", "outdir"):
        if not getattr(opt, flag):
            raise ValueError(f"--{flag}: give a folder, e.g. --indir pictures --outdir results")
    config, ckpt = find_file(opt.config), released_weights(CKPT) if opt.ckpt == CKPT else find_file(opt.ckpt)
    facts = model_facts(read_config(config))
    check_fills_masks(facts)
    settings = FillSettings(steps=opt.steps, eta=opt.ddim_eta, seed=opt.seed).checked(facts)
    from ldm.data.image import EXTENSIONS, load_image

    pairs = find_pairs(opt.indir, EXTENSIONS)
    for picture, mask in pairs:
        sizes = [load_image(path).size for path in (picture, mask)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{mask} is {sizes[1][0]}x{sizes[1][1]} pixels, {picture} {sizes[0][0]}x{sizes[0][1]}: they must be alike")
    check_ready(opt, ckpt, WHERE)
    output = NamedOutput(opt.outdir, watermark_of(opt), safety_of(opt, facts))

    from tqdm import tqdm

    pipeline = load_model(config, ckpt, opt.device, opt.precision, opt.use_ema)
    start, files = time.perf_counter(), []
    for path, mask in tqdm(pairs, desc="pictures", unit="picture"):
        # What is transparent in a mask is kept, so that it is laid over black.
        picture = fill(pipeline, load_image(path), load_image(mask, background=(0, 0, 0)), settings)
        files.append(output.save(picture._replace(info={**picture.info, "init_img": str(path), "mask": str(mask)}), path.stem))
    report(len(files), time.perf_counter() - start, files)


if __name__ == "__main__":
    sys.exit(run(main, parser=parser))
