"""Pictures from prompts, e.g. python scripts/txt2img.py --prompt "a photograph of an astronaut riding a horse"."""

from __future__ import annotations

import sys
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this script is in, installed or not

from ldm.commandline import Parser, find_file, run
from ldm.inference import PRECISIONS, choose_device, load_model, text_to_image
from ldm.pictures import Output, Picture, Watermark
from ldm.settings import Settings, check_takes_text, model_facts, read_config, read_prompts

STABLE_DIFFUSION = {
    "config": "configs/stable-diffusion/v1-inference.yaml",
    "ckpt": "models/ldm/stable-diffusion-v1/model.ckpt",
    "outdir": "outputs/txt2img-samples",
}
LAION400M = {
    "config": "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    "ckpt": "models/ldm/text2img-large/model.ckpt",
    "outdir": "outputs/txt2img-samples-laion400m",
}
WHERE = {
    STABLE_DIFFUSION["ckpt"]: "put sd-v1-4.ckpt of https://huggingface.co/CompVis/stable-diffusion-v-1-4-original there",
    LAION400M["ckpt"]: "put https://ommer-lab.com/files/latent-diffusion/nitro/txt2img-f8-large/model.ckpt there",
}


def parser() -> Parser:
    parser = Parser(prog="txt2img.py", description="Draw pictures from prompts with a latent diffusion model.")
    add = parser.add_argument
    add("--prompt", nargs="?", default="a painting of a virus monster playing guitar", help="what to draw")
    add("--negative_prompt", default="", metavar="TEXT", help="what to lead away from; needs a --scale other than 1")
    add("--from-file", metavar="FILE", help="draw every line of this file instead of --prompt, n_samples lines at once")
    add("--outdir", metavar="DIR", help=f"folder for samples/ and grids (default: {STABLE_DIFFUSION['outdir']})")
    add("--skip_grid", action="store_true", help="write no grid")
    add("--skip_save", action="store_true", help="write no single samples")
    add("--captions", action="store_true", help="write each prompt under its picture in the grid")
    add("--ddim_steps", type=int, default=50, metavar="S", help="number of sampling steps")
    solver = parser.add_mutually_exclusive_group()
    solver.add_argument("--plms", action="store_true", help="use PLMS instead of DDIM")
    solver.add_argument("--dpm_solver", action="store_true", help="use DPM-Solver++ instead of DDIM")
    add("--laion400m", action="store_true", help="config, checkpoint and folder of the LAION-400M model, where not given")
    add("--fixed_code", action="store_true", help="start every batch from the same noise")
    add("--ddim_eta", type=float, default=0.0, metavar="ETA", help="noise of DDIM: 0 is deterministic")
    add("--n_iter", type=int, default=2, metavar="N", help="how often to draw all prompts")
    add("--H", type=int, default=512, help="height of the pictures in pixels")
    add("--W", type=int, default=512, help="width of the pictures in pixels")
    add("--C", type=int, help="channels of the latents (default: the model's; Stable Diffusion 4)")
    add("--f", type=int, help="pixels per latent cell (default: the model's; Stable Diffusion 8)")
    add("--n_samples", type=int, default=3, metavar="N", help="how many pictures to draw at once")
    add("--n_rows", type=int, default=0, metavar="N", help="pictures in a row of the grid (default: n_samples)")
    add("--scale", type=float, default=7.5, help="guidance scale; 1 is none")
    add("--config", metavar="YAML", help=f"the model's config (default: {STABLE_DIFFUSION['config']})")
    add("--ckpt", metavar="FILE", help=f"the model's weights, .ckpt or .safetensors (default: {STABLE_DIFFUSION['ckpt']})")
    text = "draw with the averaged weights of a file, or with the trained ones (default: as the config says)"
    add("--use_ema", action=BooleanOptionalAction, help=text)
    add("--seed", type=int, default=42, help="seed of the noise")
    add("--precision", choices=PRECISIONS, default="autocast", help="autocast: half precision where the device gains by it; full: float32")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps")
    add("--allow-targets", action="append", default=[], metavar="PACKAGE", help="let the config name classes of this package too")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def settings_of(opt: Namespace) -> Settings:
    sampler = "plms" if opt.plms else "dpm_solver" if opt.dpm_solver else "ddim"
    return Settings(
        negative_prompt=opt.negative_prompt,
        sampler=sampler,
        steps=opt.ddim_steps,
        scale=opt.scale,
        eta=opt.ddim_eta,
        height=opt.H,
        width=opt.W,
        channels=opt.C,
        factor=opt.f,
        seed=opt.seed,
        n_samples=opt.n_samples,
        n_iter=opt.n_iter,
        fixed_code=opt.fixed_code,
    )


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    for name, value in (LAION400M if opt.laion400m else STABLE_DIFFUSION).items():
        setattr(opt, name, getattr(opt, name) or value)
    # What is wrong with the command line is said before torch is imported.
    config, ckpt = find_file(opt.config), find_file(opt.ckpt)
    facts = model_facts(read_config(config))
    check_takes_text(facts)
    settings = settings_of(opt).checked(facts)
    prompts = read_prompts(opt.from_file) if opt.from_file else opt.prompt or ""
    if opt.n_rows < 0:
        raise ValueError(f"--n_rows {opt.n_rows}: choose 1 or more, or 0 for n_samples")
    if not ckpt.is_file():
        hint = WHERE.get(opt.ckpt, "a run of your own has it in <run folder>/checkpoints/last.ckpt")
        raise FileNotFoundError(f"checkpoint {ckpt}: no such file; {hint}, or give --ckpt FILE with its --config")
    choose_device(opt.device)
    output = Output(opt.outdir, Watermark())

    if opt.allow_targets:
        from ldm.util import allow_targets

        allow_targets(*opt.allow_targets)
    pipeline = load_model(config, ckpt, opt.device, opt.precision, opt.use_ema)
    start, files, pictures, drawn = time.perf_counter(), [], [], 0
    for picture in text_to_image(pipeline, prompts, settings):
        drawn += 1
        if not opt.skip_save:
            files.append(output.save_sample(picture))
        if not opt.skip_grid:
            pictures.append(picture)
    seconds = time.perf_counter() - start
    if pictures:
        files.append(output.save_grid(grid_of(pictures, opt.n_rows or opt.n_samples, opt.captions)))
    print(f"{drawn} pictures in {seconds:.1f} s, {seconds / drawn:.2f} s each")
    if files:
        names = [str(file) for file in files]
        print("\n".join(names if len(names) <= 8 else [*names[:3], f"... {len(names) - 5} more", *names[-2:]]))


def grid_of(pictures: list[Picture], columns: int, captions: bool) -> Picture:
    """All pictures in the published grid; with captions, roomier and on white."""
    from ldm.visualize import grid

    images, prompts = [picture.image for picture in pictures], [picture.info["prompt"] for picture in pictures]
    image = grid(images, prompts, columns, padding=12) if captions else grid(images, columns=columns, background="black")
    shared = {key: value for key, value in pictures[0].info.items() if all(picture.info[key] == value for picture in pictures)}
    return Picture(image, {**shared, "prompts": prompts})


if __name__ == "__main__":
    sys.exit(run(main))
