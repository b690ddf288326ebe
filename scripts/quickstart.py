"""Train a small text-to-image model on real handwriting and draw with it, all on a CPU: python scripts/quickstart.py

Three commands do the work, and each is printed so that it can be repeated by hand: main.py trains an autoencoder, main.py trains a latent
diffusion model on its latents and their captions, txt2img.py draws digits from prompts. A picture and a table of figures end it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this script is in, installed or not

import numpy as np
from PIL import Image

from ldm.cli import Parser, run_command
from ldm.data.image import load_image, to_array
from ldm.evaluation.metrics import DigitReport, judge_digits, psnr
from ldm.output.images import GeneratedImage, NamedOutput, read_metadata
from ldm.output.watermark import Watermark
from ldm.paths import ROOT
from ldm.visualize import grid

AUTOENCODER = "configs/quickstart/autoencoder.yaml"
TEXT2IMAGE = "configs/quickstart/text2image.yaml"
SIZE = 32  # pixels
DRAWN = 60  # pictures of each digit
SHOWN = 16  # of these in the grid, a square number
FAST = 20  # --fast trains for one step in so many
GUIDANCE = 1.5  # more makes the digits plainer and less varied
DDIM_STEPS = 25

Row = tuple[str, str, str]  # figure, value, target


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="quickstart.py", description="Train a small text-to-image model on handwritten digits, and draw with it."
    )
    parser.add_argument("--outdir", type=Path, default=Path("outputs/quickstart"), help="where everything is written")
    parser.add_argument("--seed", type=int, default=23, help="seed of training and drawing")
    parser.add_argument(
        "--fast", action="store_true", help=f"1/{FAST} of the steps: see that everything works, without quality figures"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    opt = parser.parse_args(argv)
    if opt.seed < 0:
        raise ValueError(f"--seed {opt.seed}: expected an integer of at least 0")
    from ldm.data.digits import load_scans  # brings torch: --help is quick without it

    load_scans()  # where scikit-learn is missing, say so now
    opt.outdir.mkdir(parents=True, exist_ok=True)
    prompts = prompts_for(4 if opt.fast else SHOWN, 0 if opt.fast else DRAWN - SHOWN)
    prompt_file = opt.outdir / "prompts.txt"
    prompt_file.write_text("\n".join(prompt for _, prompt in prompts) + "\n", encoding="utf-8")

    stages: list[Row] = []
    autoencoder = train(AUTOENCODER, opt.outdir, opt.seed, opt.fast, stages)
    first_stage = f"model.params.first_stage_config.params.ckpt_path={autoencoder / 'checkpoints' / 'last.ckpt'}"
    text2image = train(TEXT2IMAGE, opt.outdir, opt.seed, opt.fast, stages, first_stage)
    checkpoint = text2image / "checkpoints" / "last.ckpt"
    draw = ["scripts/txt2img.py", "--config", TEXT2IMAGE, "--ckpt", str(checkpoint), "--H", str(SIZE), "--W", str(SIZE)]
    draw += ["--ddim_steps", str(DDIM_STEPS), "--scale", f"{GUIDANCE:g}", "--seed", str(opt.seed), "--n_iter", "1"]
    many = ["--from-file", str(prompt_file), "--n_samples", "100", "--skip_grid", "--outdir", str(text2image / "drawn")]
    stages.append(("drawing", f"{stage(f'draw {len(prompts)} digits from prompts', draw + many):.0f} s", ""))

    files = sorted((text2image / "drawn" / "samples").glob("*.png"))
    if len(files) != len(prompts):
        raise ValueError(
            f"{text2image / 'drawn' / 'samples'}: expected {len(prompts)} pictures, one a prompt, found {len(files)}"
        )
    pictures = [load_image(file) for file in files]
    picture = save_sheet(opt.outdir, digit_sheet(pictures, prompts), files)

    rows: list[Row] = []
    if not opt.fast:
        start = time.perf_counter()
        rows = figures(autoencoder / "checkpoints" / "last.ckpt", pictures, [digit for digit, _ in prompts])
        stages.append(("measuring", f"{time.perf_counter() - start:.0f} s", ""))
    minutes = sum(float(seconds.split()[0]) for _, seconds, _ in stages) / 60
    stages.append(("all stages", f"{minutes:.1f} min", "" if opt.fast else "at most 15 min on two cores"))
    text = table([*rows, *stages])
    (opt.outdir / "figures.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\npicture     {picture}")
    if opt.fast:
        print(
            f"            blots rather than digits after 1/{FAST} of the training; without --fast it trains for all of it"
        )
    if logged := [str(run / "images") for run in (autoencoder, text2image) if (run / "images").is_dir()]:
        print(f"training    {' and '.join(logged)} show how it went")
    print("draw more   " + shown([*draw, "--n_samples", "16", "--prompt", "a handwritten seven"]))
    return 0


def prompts_for(plain: int, varied: int) -> list[tuple[int, str]]:
    """(digit, prompt) pairs, digit by digit: first `plain` times "a handwritten seven", then `varied` other phrasings of it."""
    from ldm.data.digits import captions

    pairs = []
    for digit in range(10):
        phrasings = captions(digit)
        others = np.linspace(1, len(phrasings) - 1, varied).astype(int)
        pairs += [(digit, phrasings[0])] * plain + [(digit, phrasings[k]) for k in others]
    return pairs


def train(config: str, outdir: Path, seed: int, fast: bool, stages: list[Row], *overrides: str) -> Path:
    """Run main.py on a config -> its run folder; the seconds it took go to `stages`."""
    from omegaconf import OmegaConf

    name, logs = Path(config).stem, outdir / "runs"
    steps = OmegaConf.load(ROOT / config).lightning.trainer.max_steps // (FAST if fast else 1)
    command = ["main.py", "--base", config, "-t", "-n", name, "-l", str(logs), "-s", str(seed), *accelerator()]
    command += ["--max_steps", str(steps)] if fast else []
    seconds = stage(f"train {name}: {steps} steps", command + list(overrides))
    stages.append((f"training, {name}", f"{seconds:.0f} s", ""))
    return max(logs.glob(f"*_{name}*"))  # their names begin with the time


def accelerator() -> list[str]:
    """main.py's flag for the first GPU; none where there is none."""
    import torch

    if torch.cuda.is_available():
        return ["--gpus", "0,"]
    return ["--accelerator", "mps"] if torch.backends.mps.is_available() else []


def stage(title: str, command: Sequence[str]) -> float:
    """Announce and run `python COMMAND...` -> seconds; a failure ends the quickstart with the command's exit code."""
    print(f"\n=== {title}\n$ {shown(command)}", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        code = process.wait()  # it got the signal too, and saves its state before it stops
    if code:
        print(f"stopped: the command above ended with exit code {code}", file=sys.stderr)
        raise SystemExit(code if code > 0 else 1)
    return time.perf_counter() - start


def shown(command: Sequence[str]) -> str:
    """A command as a person in the present folder would type it."""
    return shlex.join(["python", os.path.relpath(ROOT / command[0]), *command[1:]])


def figures(first_stage: Path, drawn: Sequence[Image.Image], asked: Sequence[int]) -> list[Row]:
    """Quality of the first stage in a checkpoint, and of pictures drawn as the digits that were asked for."""
    from ldm.data.digits import Digits

    train, held_out = Digits("train", SIZE), Digits("held_out", SIZE)
    report = judge_digits(
        np.stack([to_array(image) for image in drawn]),
        np.array(asked),
        (train.images, train.labels),
        (held_out.images, held_out.labels),
    )
    return figure_rows(psnr(reconstruct(first_stage, held_out.images), held_out.images), report)


def figure_rows(first_stage_psnr: float, report: DigitReport) -> list[Row]:
    by_digit = list(report.variety.values())
    return [
        ("first stage, PSNR on held-out scans", f"{first_stage_psnr:.1f} dB", "at least 32 dB"),
        (
            "drawn digits recognized as their prompt",
            f"{100 * report.recognized:.1f} % of {report.drawn}",
            "at least 97 %",
        ),
        ("the same judge on held-out scans", f"{100 * report.accuracy:.1f} %", ""),
        (
            "variety of drawn digits, real ones = 1",
            f"{np.mean(by_digit):.2f} ({min(by_digit):.2f} to {max(by_digit):.2f})",
            "0.7 to 1.3",
        ),
        ("distance to the nearest training scan", f"{report.novelty:.2f}", "copies 0, held-out 1"),
    ]


def reconstruct(checkpoint: Path, images: np.ndarray) -> np.ndarray:
    """Pictures (N, H, W, 3) in [-1, 1], encoded and decoded by the autoencoder in a checkpoint."""
    import torch
    from omegaconf import OmegaConf

    from ldm.checkpoint import load_weights
    from ldm.config.instantiate import instantiate_from_config

    model = instantiate_from_config(OmegaConf.load(ROOT / AUTOENCODER).model).eval()
    load_weights(model, checkpoint)
    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2)  # (N, 3, H, W)
        parts = [model(part, sample_posterior=False)[0] for part in x.split(64)]
    return torch.cat(parts).clamp(-1, 1).permute(0, 2, 3, 1).numpy()


def digit_sheet(pictures: Sequence[Image.Image], prompts: Sequence[tuple[int, str]]) -> Image.Image:
    """Ten captioned squares, one a digit, each of the first pictures that were drawn from its first prompt."""
    squares, texts = [], []
    for digit in range(10):
        first = next(prompt for asked, prompt in prompts if asked == digit)
        own = [picture for picture, asked in zip(pictures, prompts) if asked == (digit, first)][:SHOWN]
        enlarged = [
            picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.BICUBIC) for picture in own
        ]
        squares.append(grid(enlarged, columns=round(len(own) ** 0.5), padding=1))
        texts.append(first)
    return grid(squares, texts, columns=5, padding=10)


def save_sheet(outdir: Path, sheet: Image.Image, files: Sequence[Path]) -> Path:
    """Write the sheet as grid.png, as every drawn picture is written, with what its pictures have in common -> its path."""
    infos = [read_metadata(file) for file in files]
    shared = {key: value for key, value in infos[0].items() if all(info.get(key) == value for info in infos)}
    flagged = any(info["flagged"] for info in infos)
    info = {**shared, "task": "quickstart", "flagged": flagged if shared.get("safety") != "off" else None}
    return NamedOutput(outdir, Watermark()).save(GeneratedImage(sheet, info, checked=True), "grid")


def table(rows: Sequence[Row]) -> str:
    """Rows with their columns aligned, under a head."""
    rows = [("figure", "value", "target"), *rows]
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


if __name__ == "__main__":
    sys.exit(run_command(main))
