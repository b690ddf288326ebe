"""Pictures from a picture and a prompt, e.g. python scripts/img2img.py --init-img sketch.png --prompt "a landscape" --strength 0.8."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this script is in, installed or not

from ldm.cli import Parser, run_command
from ldm.inference import depth_parts, fingerprint, image_to_image, load_model
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
from ldm.inference.settings import model_info, read_config, require_text_model
from ldm.inference.task_settings import ImageToImageRequest
from ldm.output.images import Output
from ldm.paths import find_file


def parser() -> Parser:
    parser = Parser(
        prog="img2img.py", description="Draw pictures from a picture and prompts with a latent diffusion model."
    )
    add = parser.add_argument
    add(
        "--init-img",
        metavar="FILE",
        help="the picture to start from, any size; it is resized to the nearest one that the model takes",
    )
    text = "0 gives the picture back as the first stage sees it, 1 draws from noise alone; strength * ddim_steps are walked"
    add("--strength", type=float, default=0.75, help=text)
    text = "for a depth model: a depth map, near is bright, or a local folder with transformers' DPT that estimates it from the picture"
    add("--depth", metavar="FILE|DIR", help=text)
    add_prompt_flags(parser, scale=5.0, n_iter=1, n_samples=2)
    add("--outdir", default="outputs/img2img-samples", metavar="DIR", help="folder for samples/ and grids")
    add("--plms", action="store_true", help="refused, as published; --sampler plms starts from a picture too")
    add_sampler_flag(parser)
    add_sampling_flags(parser)
    add_text_flags(parser)
    add_redraw_flag(parser)
    add("--seed", type=int, default=42, help="seed of the noise")
    add_model_flags(parser, **STABLE_DIFFUSION)
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parse(parser, argv, "img2img")
    # What is wrong with the command line is said before torch is imported.
    if opt.plms:
        raise ValueError("--plms: img2img refuses this flag, as published; --sampler plms starts from a picture too")
    if not opt.init_img:
        raise ValueError("--init-img: give the picture to start from, e.g. --init-img sketch.png")
    config, ckpt = find_file(opt.config), find_file(opt.ckpt)
    info = model_info(read_config(config))
    require_text_model(info, beside=1 if opt.depth else 0)
    prompts = prompts_of(opt)
    from ldm.data.image import load_depth, load_image

    image = load_image(opt.init_img)
    depth = load_depth(opt.depth) if opt.depth and not Path(opt.depth).is_dir() else None
    if opt.depth and depth is None and not (Path(opt.depth) / "config.json").is_file():
        raise FileNotFoundError(
            f"--depth {opt.depth}: holds no config.json; give a depth map or a folder with transformers' DPT"
        )
    settings = ImageToImageRequest(**prompt_settings(opt), strength=opt.strength, sampler=opt.sampler or "ddim")
    settings = settings.fitted(image.height, image.width, info).checked(info)
    if settings.emphasis:
        check_emphasis(prompts)
    source = open_ckpt(opt, ckpt)
    check_unchanged(opt, config, source)
    check_ready(opt)
    output = Output(opt.outdir, watermark_of(opt), safety_of(opt, info))

    pipeline = load_model(config, source, opt.device, opt.precision, opt.use_ema)
    pipeline.identity = {
        **pipeline.identity,
        "init_img": str(opt.init_img),
        "init_img_fingerprint": fingerprint(opt.init_img),
    }
    beside = None
    if opt.depth:
        pipeline.identity |= {"depth": str(opt.depth), "depth_fingerprint": fingerprint(opt.depth)}
        beside = depth_parts(pipeline, settings.latent_shape[1:], image, opt.depth if depth is None else depth)
    only = opt.recorded.only if opt.recorded is not None else None
    write_images(image_to_image(pipeline, image, prompts, settings, only=only, beside=beside), output, opt)


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
