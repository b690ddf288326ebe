"""Evaluate a model, a first stage or images: python scripts/evaluate.py --ckpt RUN.

Writes a card: metrics with their intervals, what they were measured on, grids, and an audit of copied training images.
"""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's checkout, installed or not

from ldm import inference
from ldm.cli import Parser, import_lightning, run_command
from ldm.evaluation import plan
from ldm.inference import cli
from ldm.paths import find_file

if TYPE_CHECKING:
    from ldm.config.model_info import ModelInfo

FEATURES = ("classifier", "inception", "dinov2", "clip", "pixels")


def parser() -> Parser:
    text = (
        "Evaluate samples of a model, a first stage, or images, against real images, and write card.json, card.md and"
        " card.png. Words such as data.params.train.params.root=FOLDER change the run's config."
    )
    parser = Parser(prog="evaluate.py", description=text, takes_overrides=True)
    add = parser.add_argument
    add("--ckpt", metavar="PATH", help="run directory or checkpoint with its config, of a model or of a first stage")
    text = "evaluate these images, not samples: a folder, an .npz with arr_0, or a split of the run in --ckpt"
    add("--images", metavar="PATH", help=text)
    text = (
        "real images: a split of the run, a folder, or an .npz with arr_0 (images), features, or mu and sigma"
        " (default: train)"
    )
    add("--real", metavar="PATH", help=text)
    text = (
        "split with held-out images and the conditions of samples, or `none` (default: validation, if the run has it)"
    )
    add("--held_out", metavar="SPLIT", help=text)
    text = (
        "features that distances are measured in (default: classifier, trained in place, if the real images have"
        " classes; else inception if its weights are available, else pixels)"
    )
    add("--features", choices=FEATURES, help=text)
    text = "weights of the features: a file (inception, clip), or a folder of transformers (dinov2)"
    add("--weights", metavar="FILE|DIR", help=text)
    cli.add_clip_flags(parser, "images and prompts, for --features clip and the CLIP score")
    add("--n_samples", type=int, default=1000, metavar="N", help="number of samples, or of images to reconstruct")
    add("--n_real", type=int, default=50000, metavar="N", help="real images, at most")
    add("--batch_size", type=int, default=50, metavar="N", help="images per batch")
    add("--size", type=int, metavar="PIXELS", help="scale and crop images of folders to squares of this side")
    add("--steps", type=int, default=50, metavar="S", help="number of sampling steps")
    text = "noise per step, from 0 (deterministic) to 1 (as DDPM) (default: the sampler's own, as in its script)"
    add("--ddim_eta", type=float, metavar="ETA", help=text)
    text = "classifier-free guidance scale; 1 disables it (default: 3 for text-conditional runs with cond_dropout)"
    add("--scale", type=float, help=text)
    cli.add_sampler_flag(parser)
    cli.add_sampling_flags(parser)
    cli.add_seed_flags(parser, modes=False)
    text = f"evaluate every combination of settings, e.g. scale=1,1.5,2; may be repeated: {', '.join(plan.SWEEPS)}"
    add("--sweep", action="append", default=[], metavar="NAME=VALUES", help=text)
    add("--compare", nargs=2, metavar="DIR", help="compare the cards of two evaluations, and evaluate nothing")
    add(
        "--outdir",
        metavar="DIR",
        help=f"folder of the card (default: {plan.OUTPUTS}/NAME, of what is evaluated and how)",
    )
    text = "folder of cached features of real images and trained classifiers"
    add("--cache", default=str(plan.OUTPUTS / "cache"), metavar="DIR", help=text)
    cli.add_model_flags(parser, None, None, measures=True)
    return parser


COMMON = {"real", "held_out", "features", "weights", "clip_weights", "clip_type", "n_real", "batch_size", "size"}
COMMON |= {"ckpt", "outdir", "cache", "device", "seed", "allow_targets", "overrides", "debug"}
TAKEN = {  # the flags that a kind of evaluation takes; a model takes all but --images and --compare
    "--compare": {"compare", "outdir", "debug"},
    "--images": COMMON | {"images"},
    "a first stage": COMMON | {"n_samples", "use_ema"},
}


def require_taken(opt: Namespace, kind: str) -> None:
    """Raise ValueError for a flag on the command line that has no effect."""
    for action in parser()._actions:
        if action.dest in opt.given and action.dest not in TAKEN[kind]:
            flag = action.option_strings[0] if action.option_strings else action.dest
            raise ValueError(f"{flag}: has no effect with {kind}; remove it")


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    opt.given = {name for name, value in parser().typed(argv).items() if value not in ([], None)}
    opt.command = shlex.join(["python", "scripts/evaluate.py", *argv])
    if opt.compare:
        require_taken(opt, "--compare")
        tasks().compare_cards(opt)
        return
    if not opt.ckpt and not opt.images:
        raise ValueError("--ckpt: pass a run directory or a checkpoint, or --images PATH with --real PATH")
    for flag, value in (("--n_samples", opt.n_samples), ("--n_real", opt.n_real), ("--batch_size", opt.batch_size)):
        if value < 2:
            raise ValueError(f"{flag} {value}: choose 2 or more")
    swept = plan.parse_sweep(opt.sweep)
    run = inference.find_run(find_file(opt.ckpt), "--ckpt") if opt.ckpt else None
    if opt.held_out is not None and run is None:
        raise ValueError(f"--held_out {opt.held_out}: it is a split of a run's data; add --ckpt RUN, or remove it")
    if opt.weights is not None and opt.features in ("classifier", "pixels"):
        raise ValueError(f"--weights: --features {opt.features} takes none; remove it")
    if opt.size is not None and not any(Path(path).is_dir() for path in (opt.images, opt.real) if path):
        raise ValueError(f"--size {opt.size}: it is for folders of images in --images or --real; remove it")
    if opt.clip_weights and not find_file(opt.clip_weights).is_file():
        raise FileNotFoundError(f"--clip_weights {opt.clip_weights}: no such file")
    if opt.weights and not find_file(opt.weights).exists():
        raise FileNotFoundError(f"--weights {opt.weights}: no such file or folder")
    if opt.images:
        require_taken(opt, "--images")
        tasks().evaluate_images(opt, run)
    elif run is not None and plan.is_first_stage(run.configs):
        require_taken(opt, "a first stage")
        if opt.held_out == "none":
            raise ValueError("--held_out none: a first stage reconstructs the images of a split; name one")
        tasks().evaluate_first_stage(opt, run)
    elif run is not None:
        info = inference.read_model_info(run.configs, plan.of_model(opt.overrides))
        if opt.clip_weights and opt.features != "clip" and not info.takes_text:
            raise ValueError(f"--clip_weights {opt.clip_weights}: this model is not text-conditional; remove it")
        points = plan.points_of(request_of(opt, info), swept, info)
        prepared = cli.prepare(opt, info, run.ckpt)
        tasks().evaluate_model(opt, run, info, swept, points, prepared)


def tasks() -> Any:
    """ldm.evaluation.tasks, which imports torch: --help and flag errors do not wait for it."""
    import_lightning()
    from ldm.evaluation import tasks

    return tasks


def request_of(opt: Namespace, info: ModelInfo) -> Any:
    """The unchecked request of the flags, of the model's kind."""
    kind = plan.request_type(info)
    scale = plan.usual_scale(info) if opt.scale is None else opt.scale
    others = {
        "eta": opt.ddim_eta,
        "scale": scale,
        "n_samples": 1,
        "batch_size": opt.batch_size,
        "prompt": "of the data",
    }
    return kind(**cli.request_fields(opt, kind, **{k: x for k, x in others.items() if plan.has_field(kind, k)}))


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
