"""Captioned images as tar shards for training: python scripts/make_shards.py --root my-images --out my-shards."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's checkout, installed or not

from ldm.cli import Parser, counted, run_command
from ldm.paths import shown_path

NONE = "none"
DEFAULT_SIZE = 256  # of training images, as in ldm.data.webdataset.ImageShards


def parser() -> Parser:
    text = (
        "Write the images and captions of a folder as tar shards with indices, in parallel. A run that was stopped "
        "continues where it was when it is started again, and ends with the same files."
    )
    parser = Parser(prog="make_shards.py", description=text)
    add = parser.add_argument
    add("--root", required=True, metavar="DIR", help="folder of the images, with subfolders")
    add("--out", required=True, metavar="DIR", help="folder for the shards")
    text = "sidecar (cat.txt next to cat.jpg), a .csv, .tsv or .jsonl table in --root, or none (default: captions.csv, "
    text += ".tsv or .jsonl if it exists, else sidecar); other columns of a table go into the JSON of each sample"
    add("--captions", metavar="TABLE", help=text)
    add("--image_column", metavar="NAME", help="column of the table with the images (default: file_name, image, ...)")
    add("--caption_column", metavar="NAME", help="column of the table with the captions (default: text, caption, ...)")
    add("--caption_encoding", default="utf-8", metavar="NAME", help="encoding of the captions")
    add("--files", metavar="FILE", help="text file that lists the images, one path below --root on each line")
    text = "train, validation or test: the folder of --root, or the rows of the table, of this split"
    add("--split", metavar="NAME", help=text)
    text = "images without a caption: raise stops, skip leaves them out, empty keeps them"
    add("--missing_caption", choices=("raise", "skip", "empty"), default="raise", help=text)
    text = "images and rows that cannot be used: skip leaves them out, raise stops at the first"
    add("--on_error", choices=("skip", "raise"), default="skip", help=text)
    add("--min_size", type=int, default=2, metavar="PIXELS", help="shorter side below which an image cannot be used")
    add("--samples", type=int, default=10_000, metavar="N", help="images in a shard")
    text = "scale larger images to this shorter side, and save them as JPEG (default: keep every file as it is)"
    add("--size", type=int, metavar="PIXELS", help=text)
    add("--quality", type=int, default=95, metavar="N", help="JPEG quality for --size, 1 to 95")
    text = "keep the order of the images, instead of a fixed random order that makes each shard a mixture of all"
    add("--keep_order", action="store_true", help=text)
    add("--workers", type=int, metavar="N", help="shards that are written at a time (default: number of CPUs)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    limits = {"samples": (1, 1_000_000), "size": (1, 65_500), "quality": (1, 95), "workers": (1, 1024)}
    limits["min_size"] = limits["size"]
    for name, (least, most) in limits.items():
        value = getattr(opt, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{name} {value}: expected {least} to {most:,}")
    # Imported here because they bring torch, which --help does not need.
    from ldm.data.base import DataConfigError
    from ldm.data.captions import SIDECAR, usual_table
    from ldm.data.order import usable_cpus
    from ldm.data.shard_writer import DATA_CONFIG, Layout, Selection, write_config, write_shards
    from ldm.output.images import make_folder

    start = time.perf_counter()
    captions = opt.captions or usual_table(Path(opt.root)) or SIDECAR
    names = ("image_column", "caption_column", "caption_encoding", "files", "split", "missing_caption", "on_error")
    options = {name: getattr(opt, name) for name in (*names, "min_size")}
    try:
        selection = Selection(opt.root, captions=None if captions == NONE else captions, **options)
    except DataConfigError as error:
        raise DataConfigError(f"--{error.param}", error.value, error.problem, error.advice) from error
    make_folder(Path(opt.out))
    layout = Layout(opt.samples, not opt.keep_order, opt.size, opt.quality)
    done = write_shards(selection, Path(opt.out), layout, opt.workers or usable_cpus())
    seconds = time.perf_counter() - start
    least, median, most = done.sides
    size = f"{done.bytes / 1e6:,.1f} MB, {seconds:.1f} s"
    print(f"{counted(done.shards, 'shard')} ({done.written} new) of {counted(done.samples, 'image')}, {size}")
    print(f"shorter sides {least} to {most} pixels, median {median}")
    if done.skipped:
        print("skipped " + ", ".join(f"{count:,} ({reason})" for reason, count in done.skipped.items()))
    split = opt.split or "train"
    config = str(write_config(selection, Path(opt.out), split, opt.size or DEFAULT_SIZE))
    files, overrides = {split: config}, []
    if opt.split is None:
        overrides = ["data.params.validation=null"]
    for other in {"train", "validation"} - {split} if opt.split else ():
        beside = Path(opt.out).absolute().with_name(other) / DATA_CONFIG
        files[other] = str(shown_path(beside)) if beside.exists() else f"{other.upper()}/{DATA_CONFIG}"
    words = ["CONFIG.yaml", *(files[name] for name in sorted(files)), "-t", *overrides]  # train before validation
    print(f"next: python main.py --base {shlex.join(words)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
