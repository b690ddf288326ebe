"""The command line: python -m tests.full [NAME ...]"""

from __future__ import annotations

import argparse
import importlib
import time

CHECKS = {
    "step_counts": "20 minutes",
    "strengths": "17 minutes",
    "sizes": "7 minutes",
    "ranks": "10 minutes",
    "engines": "8 minutes",
    "kills": "1 minute",
    "stops": "10 minutes",
    "run_kills": "10 minutes",
    "shards": "5 minutes",
    "long_run": "45 minutes, or --minutes",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.full", description="Check all values of which the test suite checks some."
    )
    parser.add_argument(
        "checks", nargs="*", metavar="NAME", help="; ".join(f"{name} ({cost})" for name, cost in CHECKS.items())
    )
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts of a single check, e.g. samplers")
    parser.add_argument("--minutes", type=float, help="duration of long_run")
    opt = parser.parse_args()
    unknown = [name for name in opt.checks if name not in CHECKS]
    if unknown or (opt.only and len(opt.checks) != 1):
        parser.error(
            f"{unknown[0]}: choose among {', '.join(CHECKS)}" if unknown else "--only needs the name of one check"
        )
    if opt.only if opt.checks == ["long_run"] else opt.minutes:
        parser.error("long_run takes --minutes, the other checks take --only")
    for name in opt.checks or CHECKS:
        start = time.monotonic()
        given = [value for value in (opt.only, opt.minutes) if value is not None]
        for line in importlib.import_module(f"tests.full.{name}").run(*given):
            print(f"{name}: {line} ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
