"""Pictures from prompts and what is near them in a database: python scripts/knn2img.py --prompt "a happy bear" --use_neighbors."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this script is in, installed or not

from ldm.cli import Parser, run_command
from ldm.inference import choose_device, load_model, text_to_image
from ldm.inference.cli import (
    add_model_flags,
    add_prompt_flags,
    add_sampler_flag,
    add_sampling_flags,
    check_ready,
    open_ckpt,
    prompt_settings,
    prompts_of,
    safety_of,
    watermark_of,
    write_images,
)
from ldm.inference.from_metadata import add_redraw_flag, check_unchanged, parse
from ldm.inference.settings import TextToImageRequest, model_info, read_config, value_at
from ldm.output.images import Output
from ldm.paths import find_file

CONFIG, CKPT = "configs/retrieval-augmented-diffusion/768x768.yaml", "models/rdm/rdm768x768/model.ckpt"
WHERE = {CKPT: "put https://ommer-lab.com/files/rdm/model.ckpt there"}


def parser() -> Parser:
    text = "Draw pictures from CLIP's vector of a prompt and, with --use_neighbors, from those of the nearest pictures in a database."
    parser = Parser(prog="knn2img.py", description=text)
    add_prompt_flags(parser, scale=5.0, n_iter=1, n_samples=3)
    add = parser.add_argument
    add("--outdir", default="outputs/txt2img-samples", metavar="DIR", help="folder for samples/ and grids")
    add("--H", type=int, default=768, help="height of the pictures in pixels")
    add("--W", type=int, default=768, help="width of the pictures in pixels")
    solver = parser.add_mutually_exclusive_group()
    solver.add_argument("--plms", action="store_true", help="use PLMS instead of DDIM")
    add_sampler_flag(solver)
    add_sampling_flags(parser)
    add_redraw_flag(parser)
    add("--n_repeat", type=int, default=1, metavar="N", help="how often the prompt's vector stands in the context")
    add("--use_neighbors", action="store_true", help="add the vectors of the nearest neighbors to the context")
    add("--knn", type=int, default=10, metavar="K", help="how many neighbors")
    text = "openimages, artbench-<style>, in data/rdm/retrieval_databases, or the folder of a database of your own"
    add("--database", default="artbench-surrealism", metavar="NAME", help=text)
    add(
        "--searcher",
        metavar="DIR",
        help="folder of scripts/train_searcher.py (default: data/rdm/searchers/<name of the database>)",
    )
    add("--clip_type", default="ViT-L/14", metavar="NAME", help="which CLIP embeds the prompts")
    add(
        "--clip_weights",
        metavar="FILE",
        help="its weights in open_clip's form (default: the hub's, from its cache where they are there)",
    )
    add("--seed", type=int, default=42, help="seed of the noise")
    add_model_flags(parser, CONFIG, CKPT)
    return parser


def settings_of(opt: Namespace) -> TextToImageRequest:
    sampler = "plms" if opt.plms else opt.sampler or "ddim"
    return TextToImageRequest(**prompt_settings(opt), sampler=sampler, height=opt.H, width=opt.W)


def main(argv: Sequence[str]) -> None:
    opt = parse(parser, argv, "knn2img")
    # What is wrong with the command line is said before torch is imported.
    config, ckpt = find_file(opt.config), find_file(opt.ckpt)
    model_config = read_config(config)
    info = model_info(model_config)
    settings = settings_of(opt).checked(info)
    check_takes_vectors(model_config)
    for flag, value in (("--n_repeat", opt.n_repeat), ("--knn", opt.knn)):
        if value < 1:
            raise ValueError(f"{flag} {value}: choose 1 or more")
    prompts = prompts_of(opt)
    from ldm.retrieval.database import Database, find_database, searcher_folder
    from ldm.retrieval.searcher import RetrievalCondition, Searcher, check_knn, import_faiss

    database = None
    if opt.use_neighbors:
        import_faiss()
        database = Database(find_database(opt.database))
        check_knn(opt.knn, database)
    source = open_ckpt(opt, ckpt, WHERE)
    check_unchanged(opt, config, source)
    check_ready(opt)
    safety = safety_of(opt, info)
    from ldm.modules.encoders.modules import FrozenCLIPTextEmbedder

    clip = FrozenCLIPTextEmbedder(opt.clip_type, n_repeat=opt.n_repeat, weights=opt.clip_weights)
    width = value_at(model_config, "model", "params", "unet_config", "params", "context_dim")
    if clip.width != width:
        raise ValueError(
            f"--clip_type {opt.clip_type}: makes vectors of {clip.width} numbers, and this model takes {width}"
        )
    searcher = None if database is None else Searcher.of(database, opt.searcher or searcher_folder(opt.database))
    encode = RetrievalCondition(clip, searcher, opt.knn, settings.negative_prompt, settings.scale)
    clip.ensure_weights()
    output = Output(opt.outdir, watermark_of(opt), safety)

    pipeline = load_model(config, source, opt.device, opt.precision, opt.use_ema)
    clip.to(choose_device(opt.device))
    pipeline.identity = {**pipeline.identity, **retrieval_of(opt)}
    only = opt.recorded.only if opt.recorded is not None else None
    write_images(text_to_image(pipeline, prompts, settings, encode=encode, task="knn2img", only=only), output, opt)


def check_takes_vectors(config: Mapping[str, Any]) -> None:
    """ValueError unless the model attends to vectors that it is handed."""
    params = config["model"].get("params") or {}
    stage, key = value_at(params, "cond_stage_config", "target"), params.get("conditioning_key")
    if key != "crossattn" or stage != "torch.nn.Identity":
        has = f"cond_stage_config {stage}, conditioning_key {key}"
        raise ValueError(f"this model does not attend to vectors of a database ({has}); {CONFIG} is one that does")


def retrieval_of(opt: Namespace) -> dict[str, Any]:
    """What the metadata says of the context."""
    text = {
        "clip": opt.clip_type,
        "clip_weights": opt.clip_weights,
        "n_repeat": opt.n_repeat,
        "use_neighbors": opt.use_neighbors,
    }
    if not opt.use_neighbors:
        return {**text, "database": None}
    return {**text, "database": opt.database, "searcher": opt.searcher, "knn": opt.knn}


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
