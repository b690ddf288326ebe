"""The claims of the latent diffusion paper in kind, on a CPU: python -m benchmarks.paper

Networks of a million parameters on scikit-learn's digits, or on a folder of images (--data), trained by main.py's own
session and measured as scripts/evaluate.py does. Runs that must be comparable get equal CPU seconds. docs/results.md is
the outcome.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ldm.atomic import save_text
from ldm.cli import EXIT_INTERRUPTED, Parser, run_command
from ldm.paths import ROOT

if TYPE_CHECKING:
    from benchmarks.paper_judge import Judge

RESULTS = ROOT / "benchmarks" / "results" / "paper"  # and, beside it, paper-NAME of a folder NAME
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
MARKS = (0.25, 0.5, 1.0)  # shares of the training time after which a diffusion model is evaluated
BATCH = 100  # generated images at once
STEPS = 10  # of DDIM, where nothing else is stated
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
SAMPLERS, STEP_COUNTS = ("ddim", "plms", "dpm_solver"), (2, 5, 10, 20, 40)
# CPU milliseconds of one image through the UNet, for the plan alone.
EVALUATION_MS = {1: 4.5, 2: 1.4, 4: 0.65, 8: 0.4}


@dataclass(frozen=True)
class Samples:
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
    """A first stage, or a diffusion model on one; `factor` 1 is diffusion in pixel space."""

    name: str
    claims: tuple[int, ...]
    factor: int
    kind: str = "kl"  # or vq
    dropout: float = 0.1
    diffusion: bool = True

    @property
    def first_stage(self) -> Run | None:
        """The run whose autoencoder a diffusion model is trained on."""
        name = f"{self.kind}-f{self.factor}" if self.diffusion and self.factor > 1 else None
        return next((run for run in RUNS if run.name == name), None)

    def samples(self, claims: Collection[int]) -> list[Samples]:
        """Those that these claims need of a diffusion model."""
        needed = [each for claim in self.claims if claim in claims for each in SAMPLES[claim]]
        return list(dict.fromkeys(needed)) if self.diffusion else []


CURVE = tuple(Samples(mark=mark) for mark in range(len(MARKS)))
GUIDED = tuple(Samples(scale=scale) for scale in SCALES)
STEPPED = tuple(Samples(sampler, steps) for sampler in SAMPLERS for steps in STEP_COUNTS)
SAMPLES = {1: CURVE, 2: CURVE, 3: CURVE, 4: GUIDED, 5: STEPPED, 6: GUIDED}  # by claim
RUNS = (
    Run("kl-f4", (1, 2, 3, 4, 5, 6), 4, diffusion=False),
    Run("kl-f2", (2,), 2, diffusion=False),
    Run("kl-f8", (2,), 8, diffusion=False),
    Run("vq-f4", (3,), 4, "vq", diffusion=False),
    Run("latent-f4", (1, 2, 3, 4, 5, 6), 4),
    Run("pixel", (1, 2), 1),
    Run("latent-f2", (2,), 2),
    Run("latent-f8", (2,), 8),
    Run("latent-vq-f4", (3,), 4, "vq"),
    Run("dropout-0", (6,), 4, dropout=0.0),
    Run("dropout-0.2", (6,), 4, dropout=0.2),
)


@dataclass(frozen=True)
class Study:
    """A dataset, the configs that its runs start from, and their budget; the defaults are those of a folder."""

    root: Path | None = None  # of images in class folders or with captions; None for the digits
    configs: tuple[str, str] = ("recipes/autoencoder-small-folder", "recipes/text-to-image-small-folder")
    channels: tuple[tuple[int, int], ...] = ((1, 3), (2, 4), (4, 8), (8, 16))  # of the latent, by factor
    stage_steps: int = 800  # of training of a first stage
    stage_step_ms: float = 63.0  # of CPU time, for the plan alone
    seconds: float = 90.0  # of CPU time of training of a diffusion model
    count: int = 200  # generated images per value
    claims: tuple[int, ...] = (1, 4)

    @property
    def name(self) -> str:
        return "digits" if self.root is None else self.root.resolve().name

    @property
    def results(self) -> Path:
        """The default folder of the results."""
        return RESULTS if self.root is None else RESULTS.with_name(f"{RESULTS.name}-{self.name}")

    @cached_property
    def splits(self) -> dict[str, dict[str, Any]]:
        """The configs of the training and the held-out images ("validation")."""
        params = load(self.configs[1])["data"]["params"]
        found: dict[str, dict[str, Any]] = {split: params[split] for split in ("train", "validation")}
        for split, config in found.items():
            if self.root is not None:
                config["params"] = {"root": str(self.root), "size": SIZE, "split": split, **labels_of(self.root)}
        return found

    @cached_property
    def data(self) -> dict[str, Any]:
        """The datasets."""
        from ldm.config.instantiate import instantiate_from_config

        return {split: instantiate_from_config(config) for split, config in self.splits.items()}

    @cached_property
    def n_classes(self) -> int:
        """Number of classes; 0 for captions."""
        return len(self.data["train"].class_names or ())

    def minutes(self, run: Run, claims: Collection[int]) -> float:
        """Estimated CPU minutes of a run."""
        if not run.diffusion:
            return self.stage_steps * self.stage_step_ms / 60e3
        evaluations = self.count * sum(samples.evaluations for samples in run.samples(claims))
        return (self.seconds + evaluations * EVALUATION_MS[run.factor] / 1e3) / 60


DIGITS = Study(
    configs=("quickstart/autoencoder", "quickstart/text2image"),
    channels=((1, 3), (2, 2), (4, 4), (8, 4)),  # the paper's are 3, 2, 3 and 4 (Table 8)
    stage_steps=250,
    stage_step_ms=85.0,
    seconds=30.0,
    count=200,
    claims=tuple(CLAIMS),
)


def labels_of(root: Path) -> dict[str, Any]:
    """Parameters of an ImageFolder: the captions of a folder, in its table or beside its images, else its classes."""
    from ldm.data.captions import SIDECAR, usual_table
    from ldm.data.listing import scan

    if table := usual_table(root):
        return {"captions": table}
    beside = any((root / name).with_suffix(".txt").is_file() for name in scan(root)[:1])
    return {"captions": SIDECAR} if beside else {"class_labels": True}


def plan(claims: Sequence[int]) -> list[Run]:
    """The runs that these claims need, first stages before the models on them."""
    return [run for run in RUNS if set(run.claims) & set(claims)]


# --------------------------------------------------------------------------------------------------------------- config


def load(name: str) -> dict[str, Any]:
    """A config of the project, with its interpolations resolved."""
    from omegaconf import OmegaConf

    from ldm.config.files import load_yaml

    found: Any = OmegaConf.to_container(load_yaml(ROOT / "configs" / f"{name}.yaml"), resolve=True)
    return found


def config_of(run: Run, study: Study, folder: Path, stages: Path) -> dict[str, Any]:
    """The config of a run that writes its checkpoints to `folder`; `stages` holds those of the first stages."""
    config = load(study.configs[run.diffusion])
    params, data = config["model"]["params"], config["data"]["params"]
    del data["validation"], params["monitor"]
    data |= {"train": study.splits["train"], "num_workers": 0}  # workers' time would not be counted
    config["lightning"]["callbacks"] = {"cuda_callback": None, "image_logger": None}
    trainer = config["lightning"]["trainer"] = {"enable_progress_bar": False, "log_every_n_steps": 20}
    if not run.diffusion:
        _set_first_stage(config["model"], run, study)
        trainer |= {"max_steps": study.stage_steps}
        params["scheduler_config"]["params"]["max_decay_steps"] = study.stage_steps
        return config
    _set_diffusion(params, run, study, stages)
    trainer |= {"max_epochs": -1, "enable_checkpointing": False}
    seconds = [study.seconds * share for share in MARKS]
    budget = {"target": "benchmarks.cpu_budget.CPUBudget", "params": {"folder": str(folder), "seconds": seconds}}
    config["lightning"]["callbacks"]["cpu_budget"] = budget
    return config


def _set_first_stage(model: dict[str, Any], run: Run, study: Study) -> None:
    """The config's autoencoder with a level for each halving; VQ is the same network with a codebook."""
    params = model["params"]
    channels, levels = dict(study.channels)[run.factor], run.factor.bit_length()
    params["ddconfig"] |= {"z_channels": channels, "ch_mult": [1] * levels, "resolution": SIZE}
    params["embed_dim"] = channels
    if run.kind == "vq":
        model["target"] = "ldm.models.autoencoder.VQModel"
        params["ddconfig"]["double_z"] = False
        params["n_embed"] = 512
        params.pop("init_logvar", None)
        options = {"perceptual_weight": 0, "use_discriminator": False}
        params["lossconfig"] = {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": options}


def _set_diffusion(params: dict[str, Any], run: Run, study: Study, stages: Path) -> None:
    """A conditional model whose UNet ends at 4x4 for every factor: each halving less is a level more."""
    side, channels = SIZE // run.factor, dict(study.channels)[run.factor]
    levels = (side // 4).bit_length()
    params |= {"image_size": side, "channels": channels, "cond_dropout": run.dropout, "use_ema": True}
    params["unet_config"]["params"] |= {
        "image_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "channel_mult": [1] * (levels - 1) + [2],  # 32 channels, and 64 at 4x4
        "attention_resolutions": [side // 4],
    }
    if study.n_classes:
        params["cond_stage_key"] = "class_label"
        params["cond_stage_config"] = {
            "target": "ldm.modules.encoders.modules.ClassEmbedder",
            "params": {"n_classes": study.n_classes + 1, "embed_dim": 64, "key": "class_label"},  # the last: no class
        }
    # Every checkpoint of a constant learning rate is as good as the end of a shorter run.
    schedule = {"warm_up_steps": [30], "f_start": [0.01], "f_max": [1.0], "f_min": [1.0], "cycle_lengths": [10**9]}
    params["scheduler_config"] = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": schedule}
    if run.first_stage is None:
        params["first_stage_config"] = {"target": "ldm.models.autoencoder.IdentityFirstStage", "params": {}}
        return
    stage = params["first_stage_config"]
    stage["params"]["ckpt_path"] = str(stages / f"{run.first_stage.name}.ckpt")
    _set_first_stage(stage, run, study)
    if run.kind == "vq":
        stage["target"] += "Interface"  # latents before quantization
    stage["params"]["lossconfig"] = {"target": "torch.nn.Identity"}


def fingerprint(run: Run, study: Study) -> str:
    """Digest of everything that a run's result depends on: a result with another one is not reused.

    That is its config, those of the first stage and the images, and how samples are generated and measured.
    """
    from benchmarks.paper_judge import REAL
    from ldm.data.image_dataset import digest
    from ldm.evaluation.classifier import VERSION

    config = config_of(run, study, Path(), Path())
    config["data"]["params"]["train"] = [getattr(study.data["train"], "fingerprint", config["data"]["params"]["train"])]
    stage = fingerprint(run.first_stage, study) if run.first_stage else ""
    return digest([config, stage, study.count, BATCH, REAL, VERSION])


# ------------------------------------------------------------------------------------------------------------ execution


def train(run: Run, study: Study, seed: int, folder: Path, stages: Path) -> dict[str, Any]:
    """Train through main.py's session -> the config. A first stage goes to `stages`, other checkpoints to `folder`."""
    from omegaconf import OmegaConf

    from ldm.training.session import run_training

    config = config_of(run, study, folder, stages)
    path = save_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
    words = ["--base", str(path), "-t", "-s", str(seed), "-l", str(folder / "logs"), "--no-test"]
    code = run_training([*words, "--allow-targets", "benchmarks"])
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(f"{run.name}, seed {seed}: training ended with exit code {code}")
    if not run.diffusion:
        [last] = (folder / "logs").glob("*/checkpoints/last.ckpt")
        last.replace(stages / f"{run.name}.ckpt")
    return config


def execute(run: Run, seed: int, stages: Path, judge: Judge, out: Path, claims: Collection[int]) -> dict[str, Any]:
    """Train and evaluate one run -> its result; the first samples of a diffusion model are saved in `out`."""
    with TemporaryDirectory(dir=stages) as temporary:
        began, folder = time.process_time(), Path(temporary)
        config = train(run, judge.study, seed, folder, stages)
        trained = time.process_time()
        if run.diffusion:
            values = judge.diffusion(config, folder, run.samples(claims), seed, out / run.name)
        else:
            values = judge.first_stage(config["model"], stages / f"{run.name}.ckpt")
            values["training_cpu_seconds"] = trained - began
        minutes = round((time.process_time() - began) / 60, 2)
    common = {"run": run.name, "seed": seed, "fingerprint": fingerprint(run, judge.study), "cpu_minutes": minutes}
    return {**common, "real": judge.facts, **values}


def read_result(out: Path, run: Run, study: Study, seed: int, claims: Collection[int] = ()) -> dict[str, Any] | None:
    """The result of a finished run; None if it is missing, was made with other settings or lacks samples of claims."""
    path = out / f"{run.name}-{seed}.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not saved or saved.get("fingerprint") != fingerprint(run, study):
        return None
    return saved if covers(saved, run.samples(claims)) else None


def covers(result: Mapping[str, Any], samples: Sequence[Samples]) -> bool:
    """True if a result has values of all these samples."""
    made = [{name: each[name] for name in asdict(Samples())} for each in result.get("samples", ())]
    return all(asdict(each) in made for each in samples)


def read_results(out: Path, study: Study) -> dict[str, dict[int, Mapping[str, Any]]]:
    """The results of the finished runs, by name and seed."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in RUNS:
        for seed in sorted(int(path.stem.rpartition("-")[2]) for path in out.glob(f"{run.name}-[0-9]*.json")):
            if result := read_result(out, run, study, seed):
                found.setdefault(run.name, {})[seed] = result
    return found


def pending(out: Path, work: Path, study: Study, claims: Sequence[int], seeds: Sequence[int]) -> list[tuple[int, Run]]:
    """(seed, run) of what is left to do, seed by seed. A first stage is trained again if a model needs its weights."""
    left = []
    for seed in seeds:
        runs = [run for run in plan(claims) if read_result(out, run, study, seed, claims) is None]
        stages = {run.first_stage for run in runs}
        needed = {stage for stage in stages if stage and not (work / str(seed) / f"{stage.name}.ckpt").is_file()}
        left += [(seed, run) for run in plan(claims) if run in runs or run in needed]
    return left


def parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.paper", description="Try the paper's claims on a CPU, at a small scale.")
    add, listed = parser.add_argument, "; ".join(f"{number}: {text}" for number, text in CLAIMS.items())
    text = "folder of images in class folders or with captions, scaled to 32x32 (default: scikit-learn's digits)"
    add("--data", type=Path, metavar="DIR", help=text)
    text = f"{listed} (default: all; with --data {','.join(map(str, Study.claims))})"
    add("--claims", type=_numbers, metavar="1,2", help=text)
    add("--seeds", type=_numbers, default=SEEDS, metavar="23,24", help=f"default: {','.join(map(str, SEEDS))}")
    text = "folder of the results, whose finished runs are skipped (default: benchmarks/results/paper, or paper-NAME)"
    add("--out", type=Path, metavar="DIR", help=text)
    add("--work", type=Path, metavar="DIR", help="folder of the first stages (default: OUT/work)")
    add("--dry-run", action="store_true", help="print what is left to do, with estimated CPU minutes")
    add("--report", action="store_true", help="only write docs/results.md and its plots from the results")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(argv: Sequence[str]) -> int:
    opt = parser().parse_args(argv)
    if opt.data is not None and not opt.data.is_dir():
        raise ValueError(f"--data {opt.data}: no such folder; pass one with class folders, or with captions")
    study = DIGITS if opt.data is None else Study(opt.data)
    claims, out = opt.claims or study.claims, opt.out or study.results
    sampled = {*study.claims, *claims}  # so that one claim alone leaves results that all can use
    if unknown := sorted(set(claims) - set(CLAIMS)):
        raise ValueError(f"--claims {unknown[0]}: choose of {', '.join(map(str, CLAIMS))}")
    work = opt.work or out / "work"
    left = [] if opt.report else pending(out, work, study, claims, opt.seeds)
    if opt.dry_run:
        for seed, run in left:
            print(f"seed {seed}  {run.name:<14} {study.minutes(run, sampled):5.1f} min")
        print(f"{len(left)} runs, about {sum(study.minutes(run, sampled) for _, run in left):.0f} CPU minutes")
        return 0
    if left:
        run_all(left, study, out, work, sampled)
    from benchmarks.paper_page import write_page

    print(write_page(out, study))
    return 0


def run_all(left: Sequence[tuple[int, Run]], study: Study, out: Path, work: Path, claims: Collection[int]) -> None:
    """Do the runs one after the other; each result is written when its run is complete."""
    import torch

    from benchmarks.environment import environment
    from benchmarks.paper_judge import Judge

    torch.set_num_threads(1)  # CPU seconds of several threads are no measure of work
    judge = Judge(study, work / "cache")
    for number, (seed, run) in enumerate(left, 1):
        print(
            f"[{number}/{len(left)}] {run.name}, seed {seed}: {study.minutes(run, claims):.1f} CPU minutes", flush=True
        )
        stages = work / str(seed)
        stages.mkdir(parents=True, exist_ok=True)
        result = {**execute(run, seed, stages, judge, out, claims), "environment": environment(torch.device("cpu"))}
        save_text(out / f"{run.name}-{seed}.json", json.dumps(result, indent=1) + "\n")
        shown = result["samples"][-1] if run.diffusion else result
        print({key: value for key, value in shown.items() if isinstance(value, float)}, flush=True)


if __name__ == "__main__":
    from benchmarks import paper  # not __main__: one class Samples, not two that never compare equal

    sys.exit(run_command(paper.main, parser=paper.parser))
