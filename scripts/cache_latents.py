"""Encode the images and captions of a training config once: cache_latents.py --base config.yaml --out cache."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout of this script, installed or not

from omegaconf import OmegaConf

from ldm.cli import Parser, import_lightning, run_command
from ldm.config.instantiate import ConfigError, allow_targets
from ldm.config.merge import find_config, merge
from ldm.config.validate import check_config
from ldm.inference.settings import PRECISIONS, check_positive
from ldm.training.flags import DEFAULT_SEED
from ldm.training.settings import resolve_seed

DESCRIPTION = """Write the first stage's latents and the text encoder's outputs of a training config to a folder.

main.py then trains on them without these two: add the data.yaml of the folder to its --base. The same command
continues after an interruption. Overrides are those of main.py: model.params.ckpt_path=sd-v1-4.ckpt ..."""
DATASETS = ("data.params.train.", "data.params.validation.", "data.params.test.")  # overrides of what is replaced


def parser() -> Parser:
    parser = Parser(takes_overrides=True, prog="cache_latents.py", description=DESCRIPTION)
    add = parser.add_argument
    add("-b", "--base", nargs="+", action="extend", required=True, metavar="YAML", help="configs, merged left to right")
    add("--out", required=True, metavar="DIR", help="folder of the cache, new or of an interrupted command")
    text = "epochs whose random crops, flips and captions are cached; training uses them in turn"
    add("--variants", type=int, default=1, metavar="N", help=text)
    add("--batch_size", type=int, default=8, metavar="N", help="images, and captions, that are encoded at once")
    text = "batch of all devices of the training, for images in buckets (default: data.params.batch_size)"
    add("--global_batch", type=int, metavar="N", help=text)
    add("--num_workers", type=int, default=2, metavar="N", help="processes that load images")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps")
    add("--precision", default="full", choices=PRECISIONS, help="precision of the encoders")
    add("--dtype", default="float16", choices=("float16", "float32"), help="precision of the cached values")
    add("--no-text", action="store_true", help="cache latents only; training then builds the text encoder")
    add("--seed", type=int, metavar="N", help=f"of crops and flips (default: lightning.seed, else {DEFAULT_SEED})")
    text = "let configs name classes of this package too; may be repeated"
    add("--allow-targets", action="append", default=[], metavar="PACKAGE", help=text)
    text = "allow shards that a command writes (pipe:aws s3 cp ... -), and run it"
    add("--allow-pipe", action="store_true", help=text)
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    allow_targets(*(prefix.rstrip(".") for prefix in opt.allow_targets))
    given = {} if opt.global_batch is None else {"--global_batch": opt.global_batch}
    check_positive({"--variants": opt.variants, "--batch_size": opt.batch_size, **given})
    if opt.num_workers < 0:
        raise ValueError(f"--num_workers {opt.num_workers}: expected at least 0")
    base = [find_config(path) for path in opt.base]
    config = merge(base, opt.overrides)
    check_config(config)
    seed = resolve_seed(opt.seed, config.get("lightning") or {})
    import_lightning()
    # Imported here because they bring torch, which --help does not need.
    from ldm.data.shards import allow_pipes
    from ldm.training.cache_latents import CacheOptions, cache_latents

    if opt.allow_pipe:
        allow_pipes()
    names = ("variants", "batch_size", "num_workers", "device", "precision", "dtype", "global_batch")
    settings = {name: getattr(opt, name) for name in names}
    options = CacheOptions(Path(opt.out), seed, text=not opt.no_text, **settings)
    written: Any = {}
    with suppress(ConfigError):  # of configs that are complete with overrides only
        written = OmegaConf.to_container(merge(base), resolve=False)
    overlay = cache_latents(config, options, written.get("data"))
    replaced = "data." if str(config.data.target).endswith(".WebDataModuleFromConfig") else DATASETS
    kept = [override for override in opt.overrides if not override.lstrip("+~").startswith(replaced)]
    words = [*opt.base, str(overlay), "-t", *kept]
    print(f"next: python main.py --base {shlex.join(words)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
