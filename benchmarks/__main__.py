"""Timings of this project beside diffusers: python -m benchmarks cpu"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from ldm.cli import Parser, run_command
from ldm.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks",
        description="Time this project and diffusers on the same work, alternating, and compare their outputs.",
    )
    add = parser.add_argument
    add("what", choices=("cpu", "gpu", "report"), help="device to run on; report: write docs/performance.md")
    add("--only", action="append", default=[], metavar="ROW", help="rows by name, * matches several (repeatable)")
    add("--size", choices=("full", "small"), default="full", help="Stable Diffusion v1, or a model of its shape")
    add("--repeat", type=int, default=5, metavar="N", help="pairs of timings in a row")
    add("--seconds", type=float, metavar="S", help="start no pair of a row after this (default: 240, gpu: 20)")
    add("--minutes", type=float, metavar="M", help="start no row after this (default: unlimited, gpu: 7)")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the results")
    add("--work", type=Path, metavar="DIR", help="keep the weights file here for the next run (full size: 2.1 GB)")
    add("--dry-run", action="store_true", help="every row with a tiny model and one pair; writes no results")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> int:
    opt = parser().parse_args(argv)
    if opt.repeat < 1:
        raise ValueError(f"--repeat {opt.repeat}: choose 1 or more")
    if opt.what == "report":
        from benchmarks.report import write_report

        print(write_report(opt.out))
        return 0
    if find_spec("diffusers") is None:
        raise ImportError("benchmarks need diffusers: pip install -e '.[benchmarks]'")
    from benchmarks.rows import ROWS  # with torch

    names = [name for name in ROWS if not opt.only or any(fnmatch(name, pattern) for pattern in opt.only)]
    if not names:
        raise ValueError(f"--only {' '.join(opt.only)}: choose of {', '.join(ROWS)}")
    with TemporaryDirectory(prefix="benchmarks-") as temporary:
        opt.work = (opt.work or Path(temporary)).resolve()
        return run(opt, names)


def run(opt: Namespace, names: Sequence[str]) -> int:
    import logging

    import torch

    from benchmarks.environment import environment
    from benchmarks.models import Models
    from benchmarks.results import Results

    if opt.what == "gpu" and not torch.cuda.is_available():
        raise ValueError("gpu: torch finds no CUDA device; choose cpu")
    logging.getLogger().setLevel(logging.WARNING)
    device = torch.device("cuda" if opt.what == "gpu" else "cpu")
    results = Results(environment(device), None if opt.dry_run else opt.out)
    models = Models("tiny" if opt.dry_run else opt.size, device, opt.work)
    defaults = (20.0, 7.0) if opt.what == "gpu" else (240.0, float("inf"))
    seconds, minutes = opt.seconds or defaults[0], opt.minutes or defaults[1]
    for name in names:
        print(results.row(name, models, 1 if opt.dry_run else opt.repeat, seconds, 60 * minutes), flush=True)
    print(results.path or "dry run: nothing was written")
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
