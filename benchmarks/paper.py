"""The claims of the latent diffusion paper in kind, on a CPU: python -m benchmarks.paper

Networks of a million parameters on scikit-learn's digits, trained by main.py's own session and sampled by the pipeline
of scripts/sample_diffusion.py. Runs that must be comparable get equal CPU seconds. docs/results.md is the outcome.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ldm.atomic import save_text
from ldm.cli import EXIT_INTERRUPTED, Parser, run_command
from ldm.paths import ROOT

if TYPE_CHECKING:
    from benchmarks.paper_judge import Judge

RESULTS = ROOT / "benchmarks" / "results" / "paper"
CLAIMS = {
    1: "latent against pixel diffusion",
    2: "the downsampling factor",
    3: "KL against VQ first stages",
    4: "guidance trades recall for precision",
    5: "steps and samplers",
    6: "condition dropout under guidance",
}
SEEDS = (23, 24, 25)
SIZE = 32  # pixels
MARKS = (7.5, 15.0, 30.0)  # CPU seconds of training after which a diffusion model is evaluated
FIRST_STAGE_STEPS = 250
SAMPLES, BATCH = 200, 100  # generated images per value, 20 of each digit
STEPS = 10  # of DDIM, where nothing else is stated
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
SAMPLERS, STEP_COUNTS = ("ddim", "plms", "dpm_solver"), (2, 5, 10, 20, 40)
CHANNELS = {1: 3, 2: 2, 4: 4, 8: 4}  # of the latent; the paper's first stages have 3, 2, 3 and 4 (Table 8)
NULL_CLASS = 10
# CPU milliseconds of one image through the UNet, and of a first stage's training step, for the plan alone.
EVALUATION_MS, STAGE_STEP_MS = {1: 4.5, 2: 1.4, 4: 0.65, 8: 0.4}, {2: 85, 4: 85, 8: 85}


@dataclass(frozen=True)
class Sampling:
    """One set of generated images. mark: index of the checkpoint."""

    sampler: str = "ddim"
    steps: int = STEPS
    scale: float = 1.0
    mark: int = len(MARKS) - 1

    @property
    def evaluations(self) -> float:
        """Network evaluations of one image."""
        return self.steps * (2 if self.scale != 1 else 1)


@dataclass(frozen=True)
class Run:
    """A first stage (no samplings), or a diffusion model on one; `factor` 1 is diffusion in pixel space."""

    name: str
    claims: tuple[int, ...]
    factor: int
    kind: str = "kl"  # or vq
    dropout: float = 0.1
    samplings: tuple[Sampling, ...] = ()

    @property
    def first_stage(self) -> str | None:
        """Name of the run whose autoencoder a diffusion model is trained on."""
        return f"{self.kind}-f{self.factor}" if self.samplings and self.factor > 1 else None

    @property
    def minutes(self) -> float:
        """Estimated CPU minutes."""
        if not self.samplings:
            return FIRST_STAGE_STEPS * STAGE_STEP_MS[self.factor] / 60e3
        images = SAMPLES * sum(sampling.evaluations for sampling in self.samplings)
        return (MARKS[-1] + images * EVALUATION_MS[self.factor] / 1e3) / 60

    def fingerprint(self) -> str:
        """Digest of the run's settings and this file's: a result with another one is not reused."""
        common = [MARKS, FIRST_STAGE_STEPS, SAMPLES, BATCH, SIZE, CHANNELS]
        # A claim that is renamed or added needs no new run.
        text = json.dumps([{**asdict(self), "claims": None}, common], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


CURVE = tuple(Sampling(mark=mark) for mark in range(len(MARKS)))
GUIDED = tuple(Sampling(scale=scale) for scale in SCALES[1:])
STEPPED = tuple(Sampling(sampler, steps) for sampler in SAMPLERS for steps in STEP_COUNTS)
RUNS = (
    Run("kl-f4", (1, 2, 3, 4, 5, 6), 4),
    Run("kl-f2", (1, 2), 2),
    Run("kl-f8", (1, 2), 8),
    Run("vq-f4", (3,), 4, "vq"),
    Run("latent-f4", (1, 2, 3, 4, 5, 6), 4, samplings=tuple(dict.fromkeys((*CURVE, *GUIDED, *STEPPED)))),
    Run("pixel", (1, 2), 1, samplings=CURVE),
    Run("latent-f2", (1, 2), 2, samplings=CURVE),
    Run("latent-f8", (1, 2), 8, samplings=CURVE),
    Run("latent-vq-f4", (3,), 4, "vq", samplings=CURVE),
    Run("dropout-0", (6,), 4, dropout=0.0, samplings=(CURVE[-1], *GUIDED)),
    Run("dropout-0.2", (6,), 4, dropout=0.2, samplings=(CURVE[-1], *GUIDED)),
)


def plan(claims: Sequence[int]) -> list[Run]:
    """The runs that these claims need, first stages before the models on them."""
    return [run for run in RUNS if set(run.claims) & set(claims)]


# --------------------------------------------------------------------------------------------------------------- config


def config_of(run: Run, folder: Path, stages: Path) -> dict[str, Any]:
    """The config of a run that writes its checkpoints to `folder`; `stages` holds those of the first stages."""
    from omegaconf import OmegaConf

    from ldm.config.files import load_yaml

    base = "text2image" if run.samplings else "autoencoder"
    config: Any = OmegaConf.to_container(load_yaml(ROOT / "configs" / "quickstart" / f"{base}.yaml"))
    params, data = config["model"]["params"], config["data"]["params"]
    del data["validation"], params["monitor"]
    config["lightning"]["callbacks"] = {"cuda_callback": None, "image_logger": None}
    trainer = config["lightning"]["trainer"] = {"enable_progress_bar": False, "log_every_n_steps": 20}
    if not run.samplings:
        _set_first_stage(config["model"], run)
        trainer |= {"max_steps": FIRST_STAGE_STEPS}
        params["scheduler_config"]["params"]["max_decay_steps"] = FIRST_STAGE_STEPS
        return config
    _set_diffusion(params, run, stages)
    trainer |= {"max_epochs": -1, "enable_checkpointing": False}
    budget = {"target": "benchmarks.cpu_budget.CPUBudget", "params": {"folder": str(folder), "seconds": list(MARKS)}}
    config["lightning"]["callbacks"]["cpu_budget"] = budget
    return config


def _set_first_stage(model: dict[str, Any], run: Run) -> None:
    """The quickstart's autoencoder with a level for each halving; VQ is the same network with a codebook."""
    params = model["params"]
    channels, levels = CHANNELS[run.factor], run.factor.bit_length()
    params["ddconfig"] |= {"z_channels": channels, "ch_mult": [1] * levels}
    params["embed_dim"] = channels
    if run.kind == "vq":
        model["target"] = "ldm.models.autoencoder.VQModel"
        params["ddconfig"]["double_z"] = False
        params["n_embed"] = 512
        options = {"perceptual_weight": 0, "use_discriminator": False}
        params["lossconfig"] = {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": options}


def _set_diffusion(params: dict[str, Any], run: Run, stages: Path) -> None:
    """A class-conditional model whose UNet ends at 4x4 for every factor: each halving less is a level more."""
    side, channels = SIZE // run.factor, CHANNELS[run.factor]
    levels = (side // 4).bit_length()
    params |= {"cond_stage_key": "class_label", "image_size": side, "channels": channels, "cond_dropout": run.dropout}
    params["unet_config"]["params"] |= {
        "image_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "channel_mult": [1] * (levels - 1) + [2],  # 32 channels, and 64 at 4x4
        "attention_resolutions": [side // 4],
    }
    params["cond_stage_config"] = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"n_classes": NULL_CLASS + 1, "embed_dim": 64, "key": "class_label"},
    }
    # Every checkpoint of a constant learning rate is as good as the end of a shorter run.
    schedule = {"warm_up_steps": [30], "f_start": [0.01], "f_max": [1.0], "f_min": [1.0], "cycle_lengths": [10**9]}
    params["scheduler_config"] = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": schedule}
    if run.first_stage is None:
        params["first_stage_config"] = {"target": "ldm.models.autoencoder.IdentityFirstStage", "params": {}}
        return
    stage: dict[str, Any] = {"target": params["first_stage_config"]["target"], "params": {}}
    stage["params"] |= params["first_stage_config"]["params"] | {"ckpt_path": str(stages / f"{run.first_stage}.ckpt")}
    _set_first_stage(stage, run)
    if run.kind == "vq":
        stage["target"] += "Interface"  # latents before quantization
    stage["params"]["lossconfig"] = {"target": "torch.nn.Identity"}
    params["first_stage_config"] = stage


# ------------------------------------------------------------------------------------------------------------ execution


def train(run: Run, seed: int, folder: Path, stages: Path) -> dict[str, Any]:
    """Train through main.py's session -> the config. A first stage goes to `stages`, other checkpoints to `folder`."""
    from omegaconf import OmegaConf

    from ldm.training.session import run_training

    config = config_of(run, folder, stages)
    path = save_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
    words = ["--base", str(path), "-t", "-s", str(seed), "-l", str(folder / "logs"), "--no-test"]
    code = run_training([*words, "--allow-targets", "benchmarks"])
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(f"{run.name}, seed {seed}: training ended with exit code {code}")
    if not run.samplings:
        [last] = (folder / "logs").glob("*/checkpoints/last.ckpt")
        last.replace(stages / f"{run.name}.ckpt")
    return config


def execute(run: Run, seed: int, stages: Path, judge: Judge, images: Path) -> dict[str, Any]:
    """Train and evaluate one run -> its result; `images` is the file of a few samples of a diffusion model."""
    with TemporaryDirectory(dir=stages) as temporary:
        began, folder = time.process_time(), Path(temporary)
        config = train(run, seed, folder, stages)
        if run.samplings:
            values = judge.diffusion(config, folder, run.samplings, seed, images)
        else:
            values = judge.first_stage(config["model"], stages / f"{run.name}.ckpt")
        minutes = round((time.process_time() - began) / 60, 2)
    return {"run": run.name, "seed": seed, "fingerprint": run.fingerprint(), "cpu_minutes": minutes, **values}


def read_result(out: Path, run: Run, seed: int) -> dict[str, Any] | None:
    """The result of a finished run; None if it is missing or was made with other settings."""
    path = out / f"{run.name}-{seed}.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return saved if saved.get("fingerprint") == run.fingerprint() else None


def read_results(out: Path, run: Run) -> list[dict[str, Any]]:
    """The results of a finished run for all seeds, in their order."""
    seeds = sorted(int(path.stem.rpartition("-")[2]) for path in out.glob(f"{run.name}-[0-9]*.json"))
    return [found for seed in seeds if (found := read_result(out, run, seed))]


def pending(out: Path, work: Path, claims: Sequence[int], seeds: Sequence[int]) -> list[tuple[int, Run]]:
    """(seed, run) of what is left to do, seed by seed. A first stage is trained again if a model needs its weights."""
    left = []
    for seed in seeds:
        runs = [run for run in plan(claims) if read_result(out, run, seed) is None]
        needed = {run.first_stage for run in runs if not (work / str(seed) / f"{run.first_stage}.ckpt").is_file()}
        left += [(seed, run) for run in plan(claims) if run in runs or run.name in needed]
    return left


def parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.paper", description="Try the paper's claims on a CPU, at a small scale.")
    add, listed = parser.add_argument, "; ".join(f"{number}: {text}" for number, text in CLAIMS.items())
    add("--claims", type=_numbers, default=tuple(CLAIMS), metavar="1,2", help=f"{listed} (default: all)")
    add("--seeds", type=_numbers, default=SEEDS, metavar="23,24", help=f"default: {','.join(map(str, SEEDS))}")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the results; finished runs are skipped")
    add("--work", type=Path, metavar="DIR", help="folder of the first stages (default: OUT/work)")
    add("--dry-run", action="store_true", help="print what is left to do, with estimated CPU minutes")
    add("--report", action="store_true", help="only write docs/results.md and its plots from the results")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(argv: Sequence[str]) -> int:
    opt = parser().parse_args(argv)
    if unknown := sorted(set(opt.claims) - set(CLAIMS)):
        raise ValueError(f"--claims {unknown[0]}: choose of {', '.join(map(str, CLAIMS))}")
    work = opt.work or opt.out / "work"
    left = pending(opt.out, work, opt.claims, opt.seeds)
    if opt.dry_run:
        for seed, run in left:
            print(f"seed {seed}  {run.name:<14} {run.minutes:5.1f} min  claims {', '.join(map(str, run.claims))}")
        print(f"{len(left)} runs, about {sum(run.minutes for _, run in left):.0f} CPU minutes")
        return 0
    if not opt.report:
        run_all(left, opt.out, work)
    from benchmarks.paper_page import write_page

    print(write_page(opt.out))
    return 0


def run_all(left: Sequence[tuple[int, Run]], out: Path, work: Path) -> None:
    """Do the runs one after the other; each result is written when its run is complete."""
    import torch

    from benchmarks.environment import environment
    from benchmarks.paper_judge import Judge

    torch.set_num_threads(1)  # CPU seconds of several threads are no measure of work
    judge = Judge(SIZE, SAMPLES, BATCH)
    for number, (seed, run) in enumerate(left, 1):
        print(f"[{number}/{len(left)}] {run.name}, seed {seed}: about {run.minutes:.1f} CPU minutes", flush=True)
        stages = work / str(seed)
        stages.mkdir(parents=True, exist_ok=True)
        images = out / f"{run.name}-{seed}.png"
        result = {**execute(run, seed, stages, judge, images), "environment": environment(torch.device("cpu"))}
        save_text(out / f"{run.name}-{seed}.json", json.dumps(result, indent=1) + "\n")
        shown = result["samplings"][-1] if run.samplings else result
        print({key: value for key, value in shown.items() if isinstance(value, float)}, flush=True)


if __name__ == "__main__":
    from benchmarks import paper  # not __main__: one class Sampling, not two that never compare equal

    sys.exit(run_command(paper.main, parser=paper.parser))
