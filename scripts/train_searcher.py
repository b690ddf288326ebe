"""Index a database of CLIP vectors for scripts/knn2img.py: python scripts/train_searcher.py -d data/rdm/retrieval_databases/openimages."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this script is in, installed or not

from ldm.cli import Parser, run_command
from ldm.paths import find_file


def parser() -> Parser:
    text = (
        "Index a database, a folder of .npz parts with embedding (N, D), img_id (N,) and patch_coords (N, 4), once for all pictures that "
        "scripts/knn2img.py draws with it. With --images the database is made first, of pictures of your own."
    )
    parser = Parser(prog="train_searcher.py", description=text)
    add = parser.add_argument
    add(
        "-d",
        "--database",
        default="data/rdm/retrieval_databases/openimages",
        metavar="DIR",
        help="folder of the database",
    )
    add("-t", "--target_path", default="data/rdm/searchers/openimages", metavar="DIR", help="folder for the index")
    add("-k", "--knn", type=int, default=20, metavar="K", help="how many neighbors the index is made to find")
    add(
        "--images",
        metavar="DIR",
        help="write the database of the pictures in this folder and below, which needs CLIP's weights",
    )
    add("--clip_type", default="ViT-L/14", metavar="NAME", help="which CLIP embeds the pictures")
    add(
        "--clip_weights",
        metavar="FILE",
        help="its weights in open_clip's form (default: the hub's, from its cache where they are there)",
    )
    add("--device", default="auto", metavar="NAME", help="where --images computes: auto, cpu, cuda, cuda:1 or mps")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parser().parse_args(argv)
    if opt.knn < 1:
        raise ValueError(f"--knn {opt.knn}: choose 1 or more")
    from ldm.retrieval.database import Database, embed_folder
    from ldm.retrieval.searcher import Searcher, import_faiss

    import_faiss()
    folder, start = find_file(opt.database), time.perf_counter()
    if opt.images is not None:
        from ldm.inference import choose_device
        from ldm.modules.encoders.modules import FrozenClipImageEmbedder

        device = choose_device(opt.device)
        clip = FrozenClipImageEmbedder(opt.clip_type, weights=opt.clip_weights)
        clip.ensure_weights()
        print(embed_folder(opt.images, folder, clip.to(device)))
    elif not folder.is_dir():
        raise FileNotFoundError(
            f"--database {folder}: no such folder; give one with .npz parts, or make it with --images DIR"
        )
    database = Database(folder)
    files = Searcher.train(database, min(opt.knn, len(database))).save(opt.target_path)
    print(f"{len(database)} vectors in {time.perf_counter() - start:.1f} s")
    print("\n".join(str(file) for file in files))


if __name__ == "__main__":
    sys.exit(run_command(main))
