"""Samples of an unconditional or class-conditional model: python scripts/sample_diffusion.py -r models/ldm/celeba256/model.ckpt -n 100."""

from __future__ import annotations

import logging
import secrets
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this script is in, installed or not

from ldm.cli import Parser, run_command
from ldm.inference import fingerprint, generate_samples, load_model
from ldm.inference.cli import (
    add_model_flags,
    add_sampler_flag,
    add_sampling_flags,
    add_seed_mode_flag,
    check_ready,
    open_ckpt,
    report,
    safety_of,
    watermark_of,
)
from ldm.inference.settings import MAX_SEED, model_info, read_config
from ldm.inference.task_settings import ClassConditionalRequest, SavedRun, find_run, parse_classes
from ldm.output.images import Output, SampleArray
from ldm.paths import find_file, in_checkout

logger = logging.getLogger(__name__)


def parser() -> Parser:
    text = (
        "Draw samples of a model without condition, or of classes, as img/*.png and as one array of the pixels as drawn (the files carry "
        "a watermark where they are large enough). Words such as model.params.use_ema=false change the config."
    )
    parser = Parser(prog="sample_diffusion.py", description=text, takes_overrides=True)
    add = parser.add_argument
    add(
        "-r",
        "--resume",
        metavar="PATH",
        help="run folder or checkpoint; its config is config.yaml beside it or the run's own",
    )
    add("-n", "--n_samples", type=int, default=50000, metavar="N", help="how many samples, exactly")
    add(
        "-e",
        "--eta",
        type=float,
        help="noise of the steps: 0 is deterministic (default: 1 with DDIM, else the sampler's own)",
    )
    solver = parser.add_mutually_exclusive_group()
    text = "walk every timestep with the ancestral chain instead of DDIM"
    solver.add_argument("-v", "--vanilla_sample", action="store_true", help=text)
    add_sampler_flag(solver)
    add_sampling_flags(parser)
    add(
        "-l",
        "--logdir",
        default="none",
        metavar="DIR",
        help="write to DIR/<run>/samples/... (default: the run's own folder)",
    )
    add("-c", "--custom_steps", type=int, default=50, metavar="S", help="number of sampling steps")
    add("--batch_size", type=int, default=10, metavar="N", help="how many samples to draw at once")
    add(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help="classes to draw in turn: 207, 1,2,3 or 10-19 (default: all, shuffled)",
    )
    add("--scale", type=float, default=1.0, help="guidance scale of class-conditional models; 1 is none")
    add(
        "--null_class",
        type=int,
        metavar="CLASS",
        help="the class that means 'no class' (default: the last, where there is one)",
    )
    add(
        "--seed",
        type=int,
        metavar="SEED",
        help="seed of the noise and of the order of classes (default: a new one, which is printed)",
    )
    add_seed_mode_flag(parser)
    add_model_flags(parser, None, None)
    return parser


def settings_of(opt: Namespace) -> ClassConditionalRequest:
    return ClassConditionalRequest(
        n_samples=opt.n_samples,
        batch_size=opt.batch_size,
        steps=opt.custom_steps,
        eta=opt.eta,
        vanilla=opt.vanilla_sample,
        sampler=opt.sampler or "ddim",
        spacing=opt.spacing,
        guidance_rescale=opt.guidance_rescale,
        dynamic_threshold=opt.dynamic_threshold,
        seed=opt.seed,
        seed_mode=opt.seed_mode,
        scale=opt.scale,
        classes=parse_classes(opt.classes) if opt.classes is not None else None,
        null_class=opt.null_class,
    )


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    # What is wrong with the command line is said before torch is imported.
    if not opt.resume:
        raise ValueError("--resume: give a run folder or a checkpoint, e.g. -r models/ldm/celeba256/model.ckpt")
    opt.seed = secrets.randbelow(MAX_SEED) if opt.seed is None else opt.seed
    saved = find_run(find_file(opt.resume))
    config = read_config(saved.configs, opt.overrides)
    info = model_info(config)
    settings = settings_of(opt).checked(info)
    if Path(opt.logdir).is_file():
        raise ValueError(f"--logdir {opt.logdir}: a file; give a folder")
    source = open_ckpt(opt, saved.ckpt)
    check_ready(opt)
    if settings.vanilla:
        logger.info("-v walks every timestep: --custom_steps and --eta have no meaning")
    watermark, safety = watermark_of(opt), safety_of(opt, info)

    pipeline = load_model(config, source, opt.device, opt.precision, opt.use_ema)
    last = saved.configs[-1]
    pipeline.identity |= {
        "config": in_checkout(last),
        "config_fingerprint": fingerprint(last),
        "overrides": opt.overrides,
    }
    folder = new_folder(saved, source.step(), opt)
    output = Output(folder, watermark, safety, samples="img/sample_{:06}.png")
    start, files, array = time.perf_counter(), [], SampleArray(folder / "numpy", settings.n_samples)
    try:
        for picture in map(output.checked, generate_samples(pipeline, settings)):
            array.append(picture.image, picture.info["class"])  # as drawn: the mark is for files that are looked at
            files.append(output.save_sample(picture))
        files.append(array.finish())
    finally:
        array.close()
    report(settings.n_samples, time.perf_counter() - start, files)
    print(f"seed {settings.seed}")


def new_folder(saved: SavedRun, step: int | None, opt: Namespace) -> Path:
    """The published place, <run>/samples/<step>/<time>, or in --logdir; with the settings in sampling_config.yaml."""
    from omegaconf import OmegaConf

    root = saved.folder if opt.logdir == "none" else Path(opt.logdir) / saved.folder.resolve().name
    above = root / "samples" / f"{step or 0:08}"
    above.mkdir(parents=True, exist_ok=True)
    now = time.strftime("%Y-%m-%d-%H-%M-%S")
    for name in (now, *(f"{now}-{k}" for k in range(1, 1000))):
        try:
            (above / name).mkdir()
        except FileExistsError:
            continue
        OmegaConf.save(OmegaConf.create(vars(opt)), above / name / "sampling_config.yaml")
        return above / name
    raise OSError(f"{above}: 1000 runs of this second are there already")


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
