"""Averaged weights of any EMA width after training: posthoc_ema.py logs/RUN --sigma-rel 0.05 0.10 0.15."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout of this script, installed or not

from ldm.cli import Parser, run_command
from ldm.config.instantiate import value_at
from ldm.config.model_info import read_config
from ldm.inference.runs import find_run


def parser() -> Parser:
    text = (
        "Combine the EMA snapshots of a run (model.params.ema_config.snapshot_every) into weights averaged with another"
        " width. The files open in every script with --ckpt. Existing files of the same run, step and width are kept."
    )
    parser = Parser(prog="posthoc_ema.py", description=text)
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory")
    text = "widths: relative standard deviations of the averages' weights over training, each in (0, 0.28)"
    add("--sigma-rel", nargs="+", type=float, required=True, metavar="S", help=text)
    text = "folder of the files ema_sigma_rel_S.safetensors, or the file of a single width (default: RUN/checkpoints)"
    add("--out", metavar="PATH", help=text)
    add("--until", type=int, metavar="STEP", help="end the averages at this optimizer step (default: the end)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    run = find_run(opt.run, "RUN")
    out = Path(opt.out) if opt.out else run.ckpt.parent
    if out.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"--out {out}: expected a folder or a .safetensors file")
    if out.suffix == ".safetensors" and len(opt.sigma_rel) > 1:
        raise ValueError(f"--out {out}: a file, but --sigma-rel has {len(opt.sigma_rel)} widths; pass a folder")
    single = out.suffix == ".safetensors"
    targets = {width: out if single else out / f"ema_sigma_rel_{width:g}.safetensors" for width in opt.sigma_rel}
    if len(set(targets.values())) < len(targets):
        widths = " ".join(map(str, opt.sigma_rel))
        raise ValueError(f"--sigma-rel {widths}: two of them agree to 6 digits and would be one file; remove one")
    every = value_at(read_config(run.configs), "model", "params", "ema_config", "every") or 1
    # Imported here because they bring torch, which --help does not need.
    from ldm.checkpoint.snapshots import SNAPSHOTS
    from ldm.convert.posthoc_ema import reconstruct

    for done in reconstruct(run.folder / SNAPSHOTS, run.ckpt, targets, opt.until, every):
        kept = ", kept as it was" if done.kept else ""
        print(f"{done.path}  sigma_rel {done.sigma_rel:g}, relative error of the profile {done.error:.1e}{kept}")


if __name__ == "__main__":
    sys.exit(run_command(main))
