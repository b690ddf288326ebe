"""Samples of an unconditional or class-conditional model: python scripts/sample_diffusion.py -r RUN -n 100."""

from __future__ import annotations

import logging
import secrets
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's checkout, installed or not

import yaml

from ldm import inference
from ldm.atomic import save_text
from ldm.cli import Parser, run_command
from ldm.inference import cli
from ldm.inference.requests import ClassConditionalRequest
from ldm.inference.settings import MAX_SEED
from ldm.output.images import GeneratedImage, Output
from ldm.paths import find_file

logger = logging.getLogger(__name__)


def parser() -> Parser:
    text = (
        "Sample an unconditional or class-conditional model. Writes img/*.png, with a watermark if they are large"
        " enough, and one array of the pixels without it. Words such as model.params.use_ema=false change the config."
    )
    parser = Parser(prog="sample_diffusion.py", description=text, takes_overrides=True)
    add = parser.add_argument
    text = "run directory or checkpoint, with the run's configs or a config.yaml next to it"
    add("-r", "--resume", metavar="PATH", help=text)
    add("-n", "--n_samples", type=int, default=50000, metavar="N", help="number of samples in total")
    text = "noise per step, from 0 (deterministic) to 1 (as DDPM) (default: 1 for DDIM, else the sampler's own)"
    add("-e", "--eta", type=float, help=text)
    solver = parser.add_mutually_exclusive_group()
    text = "ancestral sampling over every timestep instead of DDIM"
    solver.add_argument("-v", "--vanilla_sample", action="store_true", help=text)
    cli.add_sampler_flag(solver)
    cli.add_sampling_flags(parser)
    text = "write to DIR/<run>/samples/... (default: the run's own directory)"
    add("-l", "--logdir", default="none", metavar="DIR", help=text)
    add("-c", "--custom_steps", type=int, default=50, metavar="S", help="number of sampling steps")
    add("--batch_size", type=int, default=10, metavar="N", help="samples per batch")
    text = "classes, used in turn: 207, 1,2,3, 10-19, or names of the run (default: all, shuffled)"
    add("--classes", nargs="+", metavar="CLASS", help=text)
    text = "classifier-free guidance scale of class-conditional models; 1 disables it"
    add("--scale", type=float, default=1.0, help=text)
    text = "the class that means 'no class', for guidance (default: the last one if the model has one)"
    add("--null_class", type=int, metavar="CLASS", help=text)
    add("--skip_grid", action="store_true", help="do not save a grid of the first samples")
    cli.add_seed_flags(parser, seed=None)
    cli.add_model_flags(parser, None, None)
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    if not opt.resume:
        raise ValueError("--resume: pass a run directory or a checkpoint, e.g. -r models/ldm/celeba256/model.ckpt")
    opt.seed = secrets.randbelow(MAX_SEED) if opt.seed is None else opt.seed
    saved = inference.find_run(find_file(opt.resume))
    info = inference.read_model_info(saved.configs, opt.overrides)
    names = saved.class_names if info.n_classes is not None else []
    classes = inference.parse_classes(opt.classes, names) if opt.classes is not None else None
    request = ClassConditionalRequest(**cli.request_fields(opt, ClassConditionalRequest, classes=classes)).checked(info)
    if Path(opt.logdir).is_file():
        raise ValueError(f"--logdir {opt.logdir}: a file; choose a folder")
    prepared = cli.prepare(opt, info, saved.ckpt)
    if names:
        used = [shown(number, names) for number in dict.fromkeys(range(len(names)) if classes is None else classes)]
        logger.info("classes: %s%s", ", ".join(used[:20]), f", ... {len(used)} in all" if len(used) > 20 else "")
    if request.vanilla:
        logger.info("-v samples every timestep: --custom_steps and --eta have no effect")

    pipeline = cli.load(opt, prepared)
    pipeline.identity = {**pipeline.identity, "overrides": opt.overrides}
    folder = new_folder(saved, prepared.weights.step() or 0, opt)
    output = Output(folder, prepared.watermark, prepared.safety, samples="img/sample_{:06}.png")
    columns = len(classes) if classes and len(classes) <= 16 else None
    images = with_names(inference.generate_samples(pipeline, request), names)
    inference.write_samples(images, request.n_samples, output, folder / "numpy", columns, opt.skip_grid)
    print(f"seed {request.seed}")


def shown(number: int, names: Sequence[str]) -> str:
    return f"{number} {names[number]}" if number < len(names) else f"{number}"


def with_names(images: Iterable[GeneratedImage], names: Sequence[str]) -> Iterator[GeneratedImage]:
    """Record the name of each image's class."""
    for image in images:
        number = image.info["class"]
        known = number is not None and number < len(names)
        yield image._replace(info={**image.info, "class_name": names[number]}) if known else image


def new_folder(saved: inference.SavedRun, step: int, opt: Namespace) -> Path:
    """The published place, <run>/samples/<step>/<time>, or in --logdir; with the flags in sampling_config.yaml."""
    root = saved.folder if opt.logdir == "none" else Path(opt.logdir) / saved.folder.resolve().name
    above = root / "samples" / f"{step:08}"
    above.mkdir(parents=True, exist_ok=True)
    now = time.strftime("%Y-%m-%d-%H-%M-%S")
    for name in (now, *(f"{now}-{k}" for k in range(1, 1000))):
        try:
            (above / name).mkdir()
        except FileExistsError:
            continue
        text = yaml.safe_dump(vars(opt), sort_keys=False, allow_unicode=True)
        save_text(above / name / "sampling_config.yaml", text)
        return above / name
    raise OSError(f"{above}: 1000 runs were started in this second")


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
