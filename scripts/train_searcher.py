"""Index a database of CLIP vectors for scripts/knn2img.py: python scripts/train_searcher.py -d DATABASE."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's checkout, installed or not

from ldm import inference, retrieval
from ldm.cli import Parser, run_command
from ldm.inference import cli
from ldm.inference.settings import check_positive
from ldm.output.images import make_folder
from ldm.paths import find_file


def parser() -> Parser:
    text = (
        "Index a database for scripts/knn2img.py: a folder of .npz parts with embedding (N, D), img_id (N,) and "
        "patch_coords (N, 4). With --images the database is made first, from a folder of images."
    )
    parser = Parser(prog="train_searcher.py", description=text)
    add = parser.add_argument
    text = "folder of the database"
    add("-d", "--database", default="data/rdm/retrieval_databases/openimages", metavar="DIR", help=text)
    text = "folder for the index"
    add("-t", "--target_path", default="data/rdm/searchers/openimages", metavar="DIR", help=text)
    text = "number of neighbors that the index is tuned for"
    add("-k", "--knn", type=int, default=20, metavar="K", help=text)
    text = "make the database from the images in this folder and its subfolders; requires CLIP's weights"
    add("--images", metavar="DIR", help=text)
    cli.add_clip_flags(parser, "images")
    add("--device", default="auto", metavar="NAME", help="device for --images: auto, cpu, cuda, cuda:1 or mps")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    check_positive({"--knn": opt.knn})
    folder, start = find_file(opt.database), time.perf_counter()
    if opt.images is None and not folder.is_dir():
        raise FileNotFoundError(
            f"--database {folder}: no such folder; pass one with .npz parts, or make it with --images DIR"
        )
    retrieval.import_faiss()
    make_folder(Path(opt.target_path))
    if opt.images is not None:
        device = inference.choose_device(opt.device)
        clip = retrieval.clip_image_encoder(opt.clip_type, opt.clip_weights)
        clip.ensure_weights()
        print(retrieval.embed_folder(opt.images, folder, clip.to(device)))
    database = retrieval.Database(folder)
    files = retrieval.Searcher.train(database, min(opt.knn, len(database))).save(opt.target_path)
    print(f"{len(database)} vectors in {time.perf_counter() - start:.1f} s")
    print("\n".join(str(file) for file in files))


if __name__ == "__main__":
    sys.exit(run_command(main))
