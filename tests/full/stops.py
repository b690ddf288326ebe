"""A run stopped at any step and resumed equals an uninterrupted one: weights, best-of files, validations."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

import main
from ldm.checkpoint import read_checkpoint
from tests import toys

# Words of a run of 30 optimizer steps; a monitor ranks the best three.
WAYS: dict[str, list[str]] = {
    "monitor": ["--max_epochs", "5"],
    "no-monitor": ["--max_epochs", "5", "model.params.monitor=null"],
    "no-validation": ["--max_epochs", "5", "data.params.validation=null"],
    "often": ["--max_epochs", "5", "--val_check_interval", "2"],
    "rarely": ["--max_epochs", "5", "--check_val_every_n_epoch", "2"],
    "every-step": ["--max_epochs", "5", "lightning.modelcheckpoint.params.every_n_train_steps=1"],
    "max-steps": ["--max_epochs", "none", "--max_steps", "30", "--val_check_interval", "3"],
    "accumulated": ["--max_epochs", "15", "--accumulate_grad_batches", "3"],
    "gan": ["--max_epochs", "5", "model.target=tests.toys.ToyGan"],
}
QUIET = ["lightning.callbacks.image_logger=null", "lightning.callbacks.cuda_callback=null"]
KEYS = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")


class Recorded(toys.Toy):
    """Appends each validation to `validations.json`, and sends SIGTERM to itself in the step that `stop` names."""

    folder = Path()
    stop = -1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == self.stop - 1:
            self.happen("SIGTERM")
        return super().training_step(batch, batch_idx)

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            value = float(self.trainer.callback_metrics["val/loss"])
            with open(self.folder / "validations.json", "a") as file:
                file.write(json.dumps([self.global_step, self.current_epoch, value]) + "\n")


class RecordedGan(Recorded, toys.ToyGan):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == self.stop - 1:
            self.happen("SIGTERM")
        return toys.ToyGan.training_step(self, batch, batch_idx)


def train(folder: Path, words: list[str], stop: int = -1, resume: bool = False) -> int:
    """Run main.py in `folder`, stopped at the end of step `stop` -> its exit code."""
    folder.mkdir(exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    Recorded.folder, Recorded.stop = folder, stop
    try:
        config: Any = deepcopy(toys.CONFIG)
        config["model"]["target"] = f"{__name__}.Recorded"
        config["data"]["params"]["train"]["params"] = {"length": 12}
        OmegaConf.save(OmegaConf.create(config), "toy.yaml")
        start = ["-r", str(run_of(folder)), "-t"] if resume else ["-b", "toy.yaml", "-t", "-n", "run", *QUIET, *words]
        return main.main(["--allow-targets", "tests", *start])
    finally:
        os.chdir(before)


def run_of(folder: Path) -> Path:
    (run,) = (folder / "logs").glob("*_run")
    return run


def result(folder: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on where it was stopped."""
    files = sorted((run_of(folder) / "checkpoints").rglob("*.ckpt"))
    states = {path.name: {key: read_checkpoint(path)[key] for key in KEYS} for path in files}
    validations = folder / "validations.json"
    lines = validations.read_text().splitlines() if validations.exists() else []
    return {"files": states, "validations": sorted(set(lines))}


def difference(a: Any, b: Any, path: str = "") -> str:
    """The first place at which two results differ in a bit; '' if none."""
    if isinstance(a, torch.Tensor):
        return "" if torch.equal(a, b) else path
    if isinstance(a, dict):
        if set(a) != set(b):
            return f"{path}: {sorted(a)} and {sorted(b)}"
        return next((found for key in a if (found := difference(a[key], b[key], f"{path}.{key}"))), "")
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{path}: {a} and {b}"
        return next((found for i, (x, y) in enumerate(zip(a, b)) if (found := difference(x, y, f"{path}[{i}]"))), "")
    return "" if a == b else f"{path}: {a} and {b}"


def check(folder: Path, way: str, stops: Iterable[int] = range(1, 31)) -> Iterator[int]:
    """Stop and resume a run at each of `stops`; AssertionError unless it equals the uninterrupted one."""
    words = WAYS[way]
    words = [word.replace("tests.toys.ToyGan", f"{__name__}.RecordedGan") for word in words]
    assert train(folder / "whole", words) == 0
    whole = result(folder / "whole")
    for stop in stops:
        part = folder / f"stop-{stop}"
        assert train(part, words, stop) == 143, f"{way}: not stopped at step {stop}"
        assert train(part, words, resume=True) == 0, f"{way}: not resumed at step {stop}"
        assert not (found := difference(whole, result(part))), f"{way}, stopped at step {stop}: {found}"
        yield stop


def run(ways: Iterable[str] = WAYS) -> Iterator[str]:
    """Yield one line per kind of run."""
    for way in ways:
        with tempfile.TemporaryDirectory() as folder:
            done = sum(1 for _ in check(Path(folder), way))
        yield f"{way}: stopped and resumed at {done} of 30 steps, bitwise equal, best-of files and validations included"
