"""A page in the browser for all sampling tasks: python scripts/app.py, then open http://127.0.0.1:7860."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's checkout, installed or not

from ldm.cli import Parser, run_command
from ldm.inference import cli
from ldm.inference.from_metadata import parse_given
from ldm.web.models import Shelf
from ldm.web.server import Address, serve
from scripts import control2img, edit, img2img, inpaint, sample_diffusion, txt2img, upscale

TASKS = {
    script.__name__.rpartition(".")[2]: script.parser
    for script in (txt2img, img2img, inpaint, control2img, edit, upscale, sample_diffusion)
}


def parser() -> Parser:
    text = "Serve a page in the browser on which images are generated with the settings of the sampling scripts."
    parser = Parser(prog="app.py", description=text)
    add = parser.add_argument
    text = "a model to offer: a run directory, .ckpt, .safetensors or a diffusers folder; repeat it for several"
    default = "Stable Diffusion's place, and the newest quickstart run"
    add("--ckpt", action="append", default=[], metavar="PATH", help=f"{text} (default: {default})")
    text = f"YAML of models that are neither runs nor have a .yaml of their name (default: {cli.SD_CONFIG})"
    add("--config", metavar="YAML", help=text)
    text = "offer the models in this folder, and the files in its lora/, embedding/ and controlnet/"
    add("--models", metavar="FOLDER", help=text)
    add("--controlnet", action="append", default=[], metavar="PATH", help="a ControlNet to offer; may be repeated")
    add("--depth-model", metavar="DIR", help="folder with transformers' DPT, for the detector depth")
    add("--outdir", default="outputs/app", metavar="DIR", help="folder for TASK/samples/ and inputs/")
    text = "address to listen on; other computers reach 0.0.0.0, which requires the token"
    add("--host", default="127.0.0.1", metavar="ADDRESS", help=text)
    add("--port", type=int, default=7860, metavar="N", help="port to listen on")
    default = "$LDM_APP_TOKEN, else none on this computer's own address and a random, printed one on others"
    text = f"password of the page (default: {default})"
    add("--token", metavar="TEXT", help=text)
    cli.add_model_flags(parser, None, None)
    return parser


def main(argv: Sequence[str]) -> None:
    opt = parse_given(parser(), argv)
    address = Address(opt.host, opt.port, opt.token).checked()
    serve(Shelf(opt), {name: make() for name, make in TASKS.items()}, address)


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
