"""Images from a prompt under a ControlNet: python scripts/control2img.py --controlnet control.pth --control-image a.png
--detector canny --prompt "a red house"."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's checkout, installed or not

from ldm import inference
from ldm.cli import Parser, run_command
from ldm.config.model_info import CANNY, DETECTORS, ModelInfo
from ldm.inference import cli
from ldm.inference.from_metadata import add_from_metadata_flag, parse
from ldm.inference.requests import ControlRequest, require_controls
from ldm.output.images import GeneratedImage, NumberedFiles, Output


def parser() -> Parser:
    text = "Generate images from prompts under one or several ControlNets, each with its control image."
    parser = Parser(prog="control2img.py", description=text)
    add = parser.add_argument
    text = "a control image; repeat it for several ControlNets, in their order"
    add("--control-image", action="append", default=[], metavar="FILE", help=text)
    text = "weights of a ControlNet: .pth, .ckpt, .safetensors, a run directory or a folder of diffusers'; repeatable"
    add("--controlnet", action="append", default=[], metavar="PATH", help=f"{text} (default: that of --ckpt)")
    text = f"what makes the hint of the image, {', '.join(DETECTORS)} (default: none); once, or for each image"
    add("--detector", action="append", default=[], metavar="NAME", help=text)
    text = "strength of the control, 0 to 1 and more (default: 1); once, or for each image"
    add("--control-scale", action="append", type=float, default=[], metavar="SCALE", help=text)
    add("--canny", nargs=2, type=int, default=list(CANNY), metavar=("LOW", "HIGH"), help="thresholds of canny")
    add("--depth-model", metavar="DIR", help="folder with transformers' DPT, for --detector depth")
    text = "guess mode: no control in the unconditional half of guidance; the prompt may be empty"
    add("--guess", action="store_true", help=text)
    text = "shorter side of the images (default: that of training; 512 for the published models)"
    add("--resolution", type=int, metavar="SIDE", help=text)
    cli.add_prompt_flags(parser, scale=9.0, n_iter=1, n_samples=1)
    add("--outdir", default="outputs/control2img-samples", metavar="DIR", help="folder for samples/, controls/, grids")
    cli.add_sampler_flag(parser)
    cli.add_sampling_flags(parser)
    add_from_metadata_flag(parser)
    cli.add_model_flags(parser, cli.SD_CONFIG, cli.SD_CKPT)
    return parser


def request_of(opt: Namespace, info: ModelInfo) -> ControlRequest:
    """The request, for as many controls as there are control images."""
    nets = require_controls(info, len(opt.controlnet), len(opt.control_image))
    typed = opt.recorded.typed if opt.recorded else opt.given
    for flag, detector in (("canny", "canny"), ("depth_model", "depth")):
        if flag in typed and detector not in opt.detector:
            raise ValueError(f"--{flag.replace('_', '-')}: only for --detector {detector}; add it, or remove the flag")
    several: dict[str, Any] = {
        "control_scale": tuple(opt.control_scale or [1.0]),
        "detector": tuple(opt.detector or ["none"]),
    }
    several |= {"canny": tuple(opt.canny), "controls": nets}
    return ControlRequest(**{**cli.request_fields(opt, ControlRequest, prompt=cli.prompts_of(opt)), **several})


def main(argv: Sequence[str]) -> None:
    opt = parse(parser, argv, "control2img")
    info = cli.read_info(opt)
    request = request_of(opt, info)
    images = [inference.check_image(path, "--control-image", info.multiple) for path in opt.control_image]
    request = request.fitted(images[0].height, images[0].width, info).checked(info)
    hints = inference.make_hints(images, request, opt.depth_model)
    opt.controlnet = [str(cli.find_controlnet(path)) for path in opt.controlnet]
    prepared = cli.prepare(opt, info)
    output = Output(opt.outdir, prepared.watermark, prepared.safety)
    seen = NumberedFiles(Path(opt.outdir) / "controls")

    files = {"controlnet": opt.controlnet, "control_image": opt.control_image, "depth_model": opt.depth_model}
    pipeline = cli.load(opt, prepared, **files)
    nets = [inference.load_controlnet(pipeline, path, opt.use_ema) for path in opt.controlnet]
    if nets:
        pipeline.identity = {**pipeline.identity, "use_ema": opt.use_ema}  # None: each file's own default
    for hint, path, detector in zip(hints, opt.control_image, request.detector):
        print(seen.save(GeneratedImage(hint, {"task": "detect", "detector": detector, "control_image": path})))
    request = cli.in_batches(opt, request, pipeline)
    generated = inference.control_to_image(pipeline, hints, request, nets, only=opt.only)
    inference.write_images(generated, output, opt)


if __name__ == "__main__":
    sys.exit(run_command(main, parser=parser))
