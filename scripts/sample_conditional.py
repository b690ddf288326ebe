"""Samples of any conditional model: python scripts/sample_conditional.py -r RUN --batch validation:0..7.

The run's own dataset gives the conditions, or named files: --condition LR_image=small.png --condition caption="a cat".
A grid shows the inputs, the conditions as the network sees them, and the samples.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's checkout, installed or not

from ldm import inference
from ldm.cli import Parser, run_command
from ldm.inference import cli
from ldm.inference.requests import ConditionalRequest
from ldm.output.images import Output
from ldm.paths import find_file


def parser() -> Parser:
    text = (
        "Sample a trained model of any kind under the conditions of its dataset or of named files. Words such as"
        " data.params.validation.params.root=FOLDER change the run's config."
    )
    parser = Parser(prog="sample_conditional.py", description=text, takes_overrides=True)
    add = parser.add_argument
    text = "run directory or checkpoint, with the run's configs or a config.yaml next to it"
    add("-r", "--resume", metavar="PATH", help=text)
    text = "samples of the run's dataset, e.g. validation:0..7 (default: the first 8 of validation, or none)"
    add("--batch", metavar="SPLIT[:INDICES]", help=text)
    text = (
        "a value of the batch by its key: an image, a .npy array, a whole number or a text; replaces that of --batch;"
        " repeated with the same key: one for each sample"
    )
    add("--condition", action="append", default=[], metavar="KEY=VALUE", help=text)
    add("--outdir", default="outputs/conditional-samples", metavar="DIR", help="folder for samples/ and grids")
    add("--skip_grid", action="store_true", help="do not save the grid")
    add("--n_samples", type=int, default=1, metavar="N", help="images of each condition")
    add("--batch_size", type=int, default=8, metavar="N", help="conditions per batch")
    add("--steps", type=int, default=50, metavar="S", help="number of sampling steps")
    text = "noise per step, from 0 (deterministic) to 1 (as DDPM) (default: 0 for DDIM, else the sampler's own)"
    add("--ddim_eta", type=float, metavar="ETA", help=text)
    text = "classifier-free guidance scale; 1 disables it (default: 3 for models trained with cond_dropout, else 1)"
    add("--scale", type=float, help=text)
    add("--negative_prompt", default="", metavar="TEXT", help="negative prompt (text-conditional models only)")
    cli.add_sampler_flag(parser)
    cli.add_sampling_flags(parser)
    cli.add_seed_flags(parser, modes=False)
    cli.add_model_flags(parser, None, None)
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    if not opt.resume:
        raise ValueError("--resume: pass a run directory or a checkpoint, e.g. -r logs/<run>")
    run = inference.find_run(find_file(opt.resume))
    of_model = [word for word in opt.overrides if word.lstrip("+~").startswith("model.")]
    info = inference.read_model_info(run.configs, of_model)
    request = ConditionalRequest(**cli.request_fields(opt, ConditionalRequest)).checked(info)
    conditions = inference.parse_conditions(opt.condition)
    batch = opt.batch or (None if conditions else "validation")
    split, indices = inference.parse_batch(batch) if batch else ("", None)
    prepared = cli.prepare(opt, info, run.ckpt)
    samples: list[Mapping[str, Any]] = [{}] * len(conditions)
    if batch:
        samples = inference.read_samples(run, opt.overrides, split, indices, opt.seed)
    if conditions and len(conditions) not in (1, len(samples)):
        raise ValueError(f"--condition: {len(conditions)} values for {len(samples)} samples; pass one, or one for each")
    if conditions:
        samples = [{**sample, **conditions[k % len(conditions)]} for k, sample in enumerate(samples)]
    output = Output(opt.outdir, prepared.watermark, prepared.safety)

    pipeline = cli.load(opt, prepared)
    pipeline.identity = {**pipeline.identity, "overrides": opt.overrides, "batch": batch}
    named = list(conditions[0]) if conditions else []
    results = inference.sample_conditional(pipeline, samples, request, named=named)
    inference.write_conditional(results, request.n_samples, output, opt.skip_grid)


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
