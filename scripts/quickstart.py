"""Train a small text-to-image model on handwritten digits and sample from it, all on a CPU: python
scripts/quickstart.py

Three commands do the work, each printed so that it can be repeated: main.py trains an autoencoder, main.py trains a
latent diffusion model on its latents and captions, txt2img.py generates digits from prompts. The result is an image
grid and a table of metrics.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from ldm.atomic import save_text
from ldm.cli import Parser, run_command
from ldm.paths import ROOT

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ldm.evaluation.metrics import DigitReport

# torch, numpy and what imports them are imported inside functions: --help and flag errors must not wait for them.

AUTOENCODER = "configs/quickstart/autoencoder.yaml"
TEXT2IMAGE = "configs/quickstart/text2image.yaml"
SIZE = 32  # pixels
PER_DIGIT = 60  # generated images of each digit
SHOWN = 16  # of these in the grid, a square number
FAST = 20  # --fast trains for 1/FAST of the steps
GUIDANCE = 1.5  # more makes the digits clearer and less varied
DDIM_STEPS = 25

Row = tuple[str, str, str]  # metric, value, target


def main(argv: Sequence[str]) -> int:
    about = "Train a small text-to-image model on handwritten digits and sample from it."
    parser = Parser(prog="quickstart.py", description=about)
    parser.add_argument(
        "--outdir", type=Path, default=Path("outputs/quickstart"), metavar="DIR", help="folder for all results"
    )
    parser.add_argument("--seed", type=int, default=23, help="seed of training and sampling")
    parser.add_argument("--fast", action="store_true", help=f"train for 1/{FAST} of the steps, without quality metrics")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    opt = parser.parse_args(argv)
    if opt.seed < 0:
        raise ValueError(f"--seed {opt.seed}: expected an integer of at least 0")
    from ldm.data.digits import captions, load_scans
    from ldm.data.image import load_image

    load_scans()  # reports a missing scikit-learn before anything else
    every = [captions(digit) for digit in range(10)]
    prompts = prompts_for(every, *((4, 0) if opt.fast else (SHOWN, PER_DIGIT - SHOWN)))
    prompt_file = opt.outdir / "prompts.txt"
    save_text(prompt_file, "\n".join(prompt for _, prompt in prompts) + "\n")

    stages: list[Row] = []
    autoencoder = train(AUTOENCODER, opt.outdir, opt.seed, opt.fast, stages)
    first_stage = f"model.params.first_stage_config.params.ckpt_path={autoencoder / 'checkpoints' / 'last.ckpt'}"
    text2image = train(TEXT2IMAGE, opt.outdir, opt.seed, opt.fast, stages, first_stage)
    sample = ["scripts/txt2img.py", "--ckpt", str(text2image)]
    sample += ["--ddim_steps", str(DDIM_STEPS), "--scale", f"{GUIDANCE:g}"]
    sample += ["--seed", str(opt.seed), "--n_iter", "1"]
    generated = text2image / "generated"
    many = ["--from-file", str(prompt_file), "--n_samples", "100", "--skip_grid", "--outdir", str(generated)]
    seconds = stage(f"generate {len(prompts)} digits from prompts", sample + many)
    stages.append(("sampling", f"{seconds:.0f} s", ""))

    files = sorted((generated / "samples").glob("*.png"))
    if len(files) != len(prompts):
        raise ValueError(f"{generated / 'samples'}: expected {len(prompts)} images, one per prompt, found {len(files)}")
    images = [load_image(file) for file in files]
    grid_file = save_grid(opt.outdir, digit_grid(images, prompts), files)

    rows: list[Row] = []
    if not opt.fast:
        start = time.perf_counter()
        rows = metrics(autoencoder / "checkpoints" / "last.ckpt", images, [digit for digit, _ in prompts])
        stages.append(("evaluation", f"{time.perf_counter() - start:.0f} s", ""))
    minutes = sum(float(seconds.split()[0]) for _, seconds, _ in stages) / 60
    stages.append(("all stages", f"{minutes:.1f} min", "" if opt.fast else "at most 15 min on two cores"))
    text = table([*rows, *stages])
    save_text(opt.outdir / "metrics.txt", text + "\n")
    print(f"\n{text}\n\ngrid         {grid_file}")
    if opt.fast:
        print(f"             blots, not digits, after 1/{FAST} of the training; run without --fast to train fully")
    if logged := [str(run / "images") for run in (autoencoder, text2image) if (run / "images").is_dir()]:
        print(f"image logs   {' '.join(logged)}")
    print("sample more  " + command_line([*sample, "--n_samples", "16", "--prompt", "a handwritten seven"]))
    evaluate = [
        "scripts/evaluate.py",
        "--ckpt",
        str(text2image),
        "--steps",
        str(DDIM_STEPS),
        "--scale",
        f"{GUIDANCE:g}",
    ]
    print("evaluate     " + command_line(evaluate))
    return 0


def prompts_for(captions: Sequence[Sequence[str]], plain: int, varied: int) -> list[tuple[int, str]]:
    """Return (digit, prompt) pairs: per digit `plain` times the first of its captions, then `varied` others."""
    import numpy as np

    pairs = []
    for digit, every in enumerate(captions):
        others = np.linspace(1, len(every) - 1, varied).astype(int)
        pairs += [(digit, every[0])] * plain + [(digit, every[k]) for k in others]
    return pairs


def train(config: str, outdir: Path, seed: int, fast: bool, stages: list[Row], *overrides: str) -> Path:
    """Run main.py on a config, add its seconds to `stages`, and return its run directory."""
    from ldm.config.files import load_yaml

    name, logs = Path(config).stem, outdir / "runs"
    steps = load_yaml(ROOT / config).lightning.trainer.max_steps // (FAST if fast else 1)
    command = ["main.py", "--base", config, "-t", "-n", name, "-l", str(logs), "-s", str(seed)]
    command += ["--max_steps", str(steps)] if fast else []
    seconds = stage(f"train {name}: {steps} steps", command + list(overrides))
    stages.append((f"training, {name}", f"{seconds:.0f} s", ""))
    return max(logs.glob(f"*_{name}*"))  # their names begin with the time


def stage(title: str, command: Sequence[str]) -> float:
    """Print and run `python COMMAND...`, and return its seconds; exit with its code if it fails."""
    print(f"\n=== {title}\n$ {command_line(command)}", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        code = process.wait()  # it received the signal too, and saves a checkpoint before it stops
    if code:
        print(f"stopped: the command above ended with exit code {code}", file=sys.stderr)
        raise SystemExit(code if code > 0 else 1)
    return time.perf_counter() - start


def command_line(command: Sequence[str]) -> str:
    """Return a command as typed in the working directory."""
    return shlex.join(["python", os.path.relpath(ROOT / command[0]), *command[1:]])


def metrics(first_stage: Path, generated: Sequence[Image.Image], requested: Sequence[int]) -> list[Row]:
    """Evaluate the first stage in a checkpoint, and generated images of the requested digits."""
    import numpy as np

    from ldm.data.digits import Digits
    from ldm.data.image import to_array
    from ldm.evaluation.metrics import judge_digits, psnr

    train, held_out = Digits("train", SIZE), Digits("held_out", SIZE)
    report = judge_digits(
        np.stack([to_array(image) for image in generated]),
        np.array(requested),
        (train.images, train.labels),
        (held_out.images, held_out.labels),
    )
    return metric_rows(psnr(reconstruct(first_stage, held_out.images), held_out.images), report)


def metric_rows(first_stage_psnr: float, report: DigitReport) -> list[Row]:
    variety = list(report.variety.values())
    recognized = f"{100 * report.recognized:.1f} % of {report.count}"
    spread = f"{fmean(variety):.2f} ({min(variety):.2f} to {max(variety):.2f})"
    return [
        ("first stage, PSNR on held-out scans", f"{first_stage_psnr:.1f} dB", "at least 32 dB"),
        ("generated digits recognized as their prompt", recognized, "at least 97 %"),
        ("the same classifier on held-out scans", f"{100 * report.accuracy:.1f} %", ""),
        ("variety of generated digits, real ones = 1", spread, "0.7 to 1.3"),
        ("distance to the nearest training scan", f"{report.novelty:.2f}", "copies 0, held-out 1"),
    ]


def reconstruct(checkpoint: Path, images: np.ndarray) -> np.ndarray:
    """Encode and decode images (N, H, W, 3) in [-1, 1] with the autoencoder in a checkpoint."""
    import torch

    from ldm.checkpoint.load import load_weights
    from ldm.config.files import load_yaml
    from ldm.config.instantiate import instantiate_from_config

    model = instantiate_from_config(load_yaml(ROOT / AUTOENCODER).model).eval()
    load_weights(model, checkpoint)
    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2)  # (N, 3, H, W)
        parts = [model(part, sample_posterior=False)[0] for part in x.split(64)]
    return torch.cat(parts).clamp(-1, 1).permute(0, 2, 3, 1).numpy()


def digit_grid(images: Sequence[Image.Image], prompts: Sequence[tuple[int, str]]) -> Image.Image:
    """Return a grid of ten captioned squares, one per digit, of the first images of its first prompt."""
    from PIL.Image import Resampling

    from ldm.visualize import grid

    squares, texts = [], []
    for digit in range(10):
        first = next(prompt for requested, prompt in prompts if requested == digit)
        own = [image for image, prompt in zip(images, prompts) if prompt == (digit, first)][:SHOWN]
        upscaled = [image.resize((2 * image.width, 2 * image.height), Resampling.BICUBIC) for image in own]
        squares.append(grid(upscaled, columns=round(len(own) ** 0.5), padding=1))
        texts.append(first)
    return grid(squares, texts, columns=5, padding=10)


def save_grid(outdir: Path, image: Image.Image, files: Sequence[Path]) -> Path:
    """Save the grid as grid.png, watermarked, with the metadata that its images share, and return its path."""
    from ldm.output.images import GeneratedImage, NamedOutput, read_metadata
    from ldm.output.watermark import Watermark

    infos = [read_metadata(file) for file in files]
    shared = {key: value for key, value in infos[0].items() if all(info.get(key) == value for info in infos)}
    flagged = any(info["flagged"] for info in infos)
    info = {**shared, "task": "quickstart", "flagged": flagged if shared.get("safety") != "off" else None}
    return NamedOutput(outdir, Watermark()).save(GeneratedImage(image, info, checked=True), "grid")


def table(rows: Sequence[Row]) -> str:
    """Return the rows with aligned columns, below a header."""
    rows = [("metric", "value", "target"), *rows]
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


if __name__ == "__main__":
    sys.exit(run_command(main))
