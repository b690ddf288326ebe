"""Images from prompts and nearest neighbors: python scripts/knn2img.py --prompt "a happy bear" --use_neighbors."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's checkout, installed or not

from ldm import inference, retrieval
from ldm.cli import Parser, run_command
from ldm.inference import cli
from ldm.inference.from_metadata import add_from_metadata_flag, parse
from ldm.inference.requests import RetrievalRequest
from ldm.inference.settings import check_positive
from ldm.output.images import Output

CONFIG, CKPT = "configs/retrieval-augmented-diffusion/768x768.yaml", "models/rdm/rdm768x768/model.ckpt"


def parser() -> Parser:
    text = "Generate images from the CLIP vector of a prompt and, with --use_neighbors, of its neighbors in a database."
    parser = Parser(prog="knn2img.py", description=text)
    cli.add_prompt_flags(parser, scale=5.0, n_iter=1, n_samples=3, text_encoder=False)
    add = parser.add_argument
    add("--outdir", default="outputs/txt2img-samples", metavar="DIR", help="folder for samples/ and grids")
    cli.add_size_flags(parser, 768)
    solver = parser.add_mutually_exclusive_group()
    solver.add_argument("--plms", action="store_true", help="the same as --sampler plms")
    cli.add_sampler_flag(solver)
    cli.add_sampling_flags(parser)
    add_from_metadata_flag(parser)
    add(
        "--n_repeat",
        type=int,
        default=1,
        metavar="N",
        help="number of copies of the prompt's vector in the conditioning",
    )
    add("--use_neighbors", action="store_true", help="add the vectors of the nearest neighbors to the conditioning")
    add("--knn", type=int, default=10, metavar="K", help="number of neighbors")
    text = "openimages or artbench-<style>, in data/rdm/retrieval_databases, or the folder of another database"
    add("--database", default="artbench-surrealism", metavar="NAME|DIR", help=text)
    text = "index made by scripts/train_searcher.py (default: data/rdm/searchers/<database>)"
    add("--searcher", metavar="DIR", help=text)
    cli.add_clip_flags(parser, "prompts")
    cli.add_model_flags(parser, CONFIG, CKPT)
    return parser


def request_of(opt: Namespace) -> RetrievalRequest:
    sampler = "plms" if opt.plms else opt.sampler or "ddim"
    return RetrievalRequest(**cli.request_fields(opt, RetrievalRequest, sampler=sampler, prompt=cli.prompts_of(opt)))


def main(argv: Sequence[str]) -> None:
    opt = parse(parser, argv, "knn2img")
    info = cli.read_info(opt)
    request = request_of(opt).checked(info)
    check_positive({"--n_repeat": opt.n_repeat, "--knn": opt.knn})
    database = None
    if opt.use_neighbors:
        retrieval.import_faiss()
        database = retrieval.Database(retrieval.find_database(opt.database))
        retrieval.check_knn(opt.knn, database)
    prepared = cli.prepare(opt, info)
    clip = retrieval.clip_text_encoder(opt.clip_type, opt.n_repeat, opt.clip_weights)
    if clip.width != info.context_dim:
        raise ValueError(
            f"--clip_type {opt.clip_type}: its vectors have {clip.width} values, this model takes {info.context_dim}"
        )
    searcher = None
    if database is not None:
        searcher = retrieval.Searcher.of(database, opt.searcher or retrieval.searcher_folder(opt.database))
    encode = retrieval.RetrievalCondition(clip, searcher, opt.knn, request.negative_prompt, request.scale)
    clip.ensure_weights()
    output = Output(opt.outdir, prepared.watermark, prepared.safety)

    pipeline = cli.load(opt, prepared)
    clip.to(pipeline.device)
    pipeline.identity = {**pipeline.identity, **record(opt)}
    request = cli.in_batches(opt, request, pipeline)
    inference.write_images(inference.text_to_image(pipeline, request, encode=encode, only=opt.only), output, opt)


def record(opt: Namespace) -> dict[str, Any]:
    """Metadata of the conditioning."""
    names = (
        "clip_weights",
        "n_repeat",
        "use_neighbors",
        *(("database", "searcher", "knn") if opt.use_neighbors else ()),
    )
    return {"database": None, "clip": opt.clip_type, **{name: getattr(opt, name) for name in names}}


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
