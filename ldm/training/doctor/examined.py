"""The state of an examination: the training command, its parts that could be built, and the findings so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch.optim.lr_scheduler import LambdaLR

from ldm.cli import one_line
from ldm.config.instantiate import value_at
from ldm.data.datamodule import unwrapped
from ldm.training.devices import Devices
from ldm.training.doctor.footprint import Footprint
from ldm.training.run import batches_of
from ldm.training.run_directory import RunDirectory
from ldm.training.settings import LearningRate, RunSettings

Value = TypeVar("Value")


class Finding(NamedTuple):
    """A line of the report: the YAML path and its value, what is wrong, and the value to set."""

    text: str
    is_problem: bool


def problem(text: str) -> Finding:
    return Finding(text, True)


def note(text: str) -> Finding:
    return Finding(text, False)


@dataclass
class Examined:
    """A training command and the parts of its run; those that cannot be built are None or empty."""

    config: DictConfig
    plain: Mapping[str, Any]
    settings: RunSettings
    directory: RunDirectory
    devices: Devices
    has_devices: bool  # this machine has these devices
    findings: list[Finding] = field(default_factory=list)
    rate: LearningRate | None = None
    data: Any = None
    samples: list[Any] = field(default_factory=list)
    sample_seconds: float = 0.0
    batch: Any = None  # the samples, collated
    model: Any = None
    trainer: pl.Trainer | None = None
    footprint: Footprint | None = None
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    schedulers: list[Any] = field(default_factory=list)
    step_seconds: float | None = None  # of a step with numbers, for each sample
    step_text: str = "not computed"
    latent_text: str = ""

    @property
    def params(self) -> Mapping[str, Any]:
        return self.plain["model"].get("params") or {}

    @property
    def datasets(self) -> dict[str, Any]:
        """The datasets by split, without the WrappedDataset of `wrap`."""
        return {name: unwrapped(each) for name, each in getattr(self.data, "datasets", {}).items()}

    @property
    def ranks(self) -> int:
        return self.devices.processes * self.settings.num_nodes

    @property
    def batch_size(self) -> int:
        return int(value_at(self.plain, "data", "params", "batch_size") or 1)

    @property
    def accumulated(self) -> int:
        """Batches of an optimizer step."""
        return int(self.settings.trainer.get("accumulate_grad_batches") or 1)

    @property
    def precision(self) -> str:
        if self.trainer is not None:
            return str(self.trainer.precision)
        given = str(self.settings.trainer.get("precision") or 32)
        return given if "-" in given else f"{given}-true"

    @property
    def batches(self) -> int | None:
        """Batches of an epoch of one rank; None if the number of samples is unknown."""
        count = batches_of(self.data, self.ranks).get("train") if self.data is not None else None
        limit = self.settings.trainer.get("limit_train_batches")
        if count is None or limit is None:
            return count
        return int(count * limit) if isinstance(limit, float) else min(count, limit)

    @property
    def epoch_steps(self) -> int | None:
        return math.ceil(self.batches / self.accumulated) if self.batches else None

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run; None if it has no end."""
        limits = []
        steps, epochs = (self.settings.trainer.get(name) for name in ("max_steps", "max_epochs"))
        if steps is not None and steps >= 0:
            limits.append(steps)
        elif epochs is None:
            epochs = 1000  # Lightning's default
        if epochs is not None and epochs >= 0 and self.epoch_steps is not None:
            limits.append(epochs * self.epoch_steps)
        return min(limits, default=None)

    @property
    def run_length(self) -> str:
        """The setting that ends the run, for messages."""
        steps = self.settings.trainer.get("max_steps")
        return "lightning.trainer.max_steps" if steps is not None and steps >= 0 else "lightning.trainer.max_epochs"

    @property
    def strategy(self) -> str:
        return str(self.settings.trainer.get("strategy", "ddp" if self.ranks > 1 else "auto"))

    @property
    def rate_factor(self) -> Callable[[int], float] | None:
        """The multiplier of the learning rate at a step; None without a schedule that is a function of it."""
        schedule = self.schedulers[0] if self.schedulers else None
        return schedule.lr_lambdas[0] if isinstance(schedule, LambdaLR) else None

    def attempt(self, action: Callable[[], Value]) -> Value | None:
        """Return the result of `action`; for an error that would end a run early, add a problem and return None."""
        try:
            return action()
        except (ValueError, OSError, ImportError) as error:  # ConfigError is a ValueError
            self.findings.append(problem(one_line(error)))
            return None
