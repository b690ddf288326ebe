"""Timings of this project beside diffusers: python -m benchmarks cpu"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from ldm.cli import Parser, one_line, run_command
from ldm.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks",
        description="Time this project and diffusers on the same work, alternating, and compare their outputs.",
    )
    add = parser.add_argument
    choices = ("cpu", "gpu", "report")
    text = "device to run on; report: write docs/performance.md from the results"
    add("what", choices=choices, metavar="|".join(choices), help=text)
    add("--only", action="append", default=[], metavar="ROW", help="rows by name, * matches several (repeatable)")
    add("--size", choices=("full", "small"), default="full", help="Stable Diffusion v1, or a model of its shape")
    add("--repeat", type=int, default=5, metavar="N", help="pairs of timings in a row")
    add("--seconds", type=float, metavar="S", help="start no pair of a row after this (default: 240, gpu: 20)")
    add("--minutes", type=float, metavar="M", help="start no row after this (default: unlimited, gpu: 7)")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the results; report: also of its page")
    add("--work", type=Path, metavar="DIR", help="keep the weights file here for the next run (full size: 2.1 GB)")
    add("--dry-run", action="store_true", help="every row with a tiny model and one pair; writes no results")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> int:
    opt = parser().parse_args(argv)
    if opt.what == "report":
        return report(opt, [name for name in parser().typed(argv) if name not in ("what", "out", "debug")])
    if opt.repeat < 1:
        raise ValueError(f"--repeat {opt.repeat}: choose 1 or more")
    import_diffusers()
    from benchmarks.rows import ROWS  # with torch

    names = [name for name in ROWS if not opt.only or any(fnmatch(name, pattern) for pattern in opt.only)]
    if not names:
        raise ValueError(f"--only {' '.join(opt.only)}: choose of {', '.join(ROWS)}")
    with TemporaryDirectory(prefix="benchmarks-") as temporary:
        opt.work = (opt.work or Path(temporary)).resolve()
        return run(opt, names)


def report(opt: Namespace, ignored: Sequence[str]) -> int:
    from benchmarks.report import PAGE, write_report

    if ignored:
        raise ValueError(
            f"report: --{ignored[0].replace('_', '-')} has no effect on the page of all results; remove it"
        )
    print(write_report(opt.out, PAGE if opt.out == RESULTS else opt.out / PAGE.name))
    return 0


def import_diffusers() -> None:
    """Raise ImportError with advice if diffusers is missing or cannot be imported."""
    try:
        import diffusers  # noqa: F401 (heavy: kept out of --help and of report)
    except Exception as error:  # of any kind: versions of its dependencies that do not match
        raise ImportError(
            f"benchmarks need diffusers, which cannot be imported ({one_line(error)}): "
            "pip install --upgrade -e '.[benchmarks]'"
        ) from error


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
