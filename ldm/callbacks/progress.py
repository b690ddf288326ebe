"""Progress of a run: a report at its start and end, one bar over all steps, and the cost of each epoch."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from ldm.callbacks.checkpoints import MIB
from ldm.cli import counted
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.optimizers import arguments_of, class_names
from ldm.modules.ema import PowerEma

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]  # a module or None

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15.0
RATE_SECONDS = 300.0  # over which the rate behind the time left is averaged


class ProgressBar(pl.Callback):
    """One bar over the whole run on a terminal, elsewhere a log line every few seconds.

    The time left follows the average rate of the last five minutes, pauses included.
    Both show the metrics that a model logs with `prog_bar=True`, or else the loss that its training step returns.
    """

    def __init__(self, seconds_between_lines: float = SECONDS_BETWEEN_LINES) -> None:
        super().__init__()
        self.seconds_between_lines = seconds_between_lines
        self._bar: tqdm | None = None
        self._lines: deque[tuple[float, int]] = deque()  # time and batches at the start and at each line

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._total = total_batches(trainer)
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self._lines = deque([(time.monotonic(), done)])
        if trainer.is_global_zero and sys.stderr.isatty():
            options: dict[str, Any] = {"unit": "batch", "dynamic_ncols": True, "mininterval": 0.3, "smoothing": 0.003}
            self._bar = tqdm(total=self._total, initial=done, **options)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if self._bar is not None:
            # Metrics are read only when the bar is redrawn: reading them waits for the device.
            if self._bar.update(done - self._bar.n):
                self._bar.set_description(f"epoch {trainer.current_epoch}", refresh=False)
                self._bar.set_postfix(_metrics(trainer, outputs), refresh=False)
            return
        now = time.monotonic()
        if now - self._lines[-1][0] >= self.seconds_between_lines:
            while len(self._lines) > 1 and now - self._lines[1][0] > RATE_SECONDS:
                self._lines.popleft()
            began, batches = self._lines[0]
            rate = (done - batches) / (now - began)
            metrics = "  ".join(f"{name} {value}" for name, value in _metrics(trainer, outputs).items())
            of, left = (f"/{self._total}", f"  {_clock((self._total - done) / rate)} left") if self._total else ("", "")
            place = f"epoch {trainer.current_epoch}, batch {done}{of}"
            logger.info("%-11s %s  %s  %.2f batches/s%s", "training", place, metrics, rate, left)
            self._lines.append((now, done))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_time = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        logged = trainer._logger_connector.metrics["callback"]  # callback_metrics has those of earlier validations too
        values = {name: float(value) for name, value in logged.items() if name.startswith("val")}
        monitor = getattr(pl_module, "monitor", None)
        shown: dict[str, float] = {}
        for name in sorted(values, key=lambda name: (name != monitor, name)):
            # The loggers have all of them; here a loss that is switched off or another's double says nothing, and those
            # of each noise level are a plot.
            if name == monitor or ("_logsnr_" not in name and values[name] != 0 and values[name] not in shown.values()):
                shown[name] = values[name]
        text = ", ".join(f"{name} {value:.4g}{_unit(name, pl_module)}" for name, value in shown.items())
        seconds = time.monotonic() - self._validation_time
        logger.info("%-11s step %d: %s (%.1f s)", "validation", trainer.global_step, text or "nothing logged", seconds)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _unit(name: str, pl_module: pl.LightningModule) -> str:
    summed = getattr(getattr(pl_module, "loss", None), "summed", ())  # of the autoencoders' losses
    return " per image" if name.rpartition("/")[2].removesuffix("_ema") in summed else ""


def _metrics(trainer: pl.Trainer, outputs: Any) -> dict[str, str]:
    logged: dict[str, Any] = {
        name: value
        for name, value in trainer.progress_bar_metrics.items()
        if not name.startswith("val") and not name.endswith("_epoch")
    }
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if isinstance(loss, Tensor) and not any("loss" in name for name in logged):
        logged = {"loss": loss.item(), **logged}
    names = {name: name.removesuffix("_step") for name in logged}
    return {names[name]: f"{float(logged[name]):.4g}{_unit(names[name], trainer.lightning_module)}" for name in logged}


def total_batches(trainer: pl.Trainer) -> int | None:
    """Return the number of training batches of the whole run, None if unlimited."""
    per_epoch = trainer.num_training_batches
    totals = []
    if trainer.max_epochs not in (None, -1) and math.isfinite(per_epoch):
        totals.append(int(trainer.max_epochs * per_epoch))
    if trainer.max_steps != -1:
        own = getattr(trainer.lightning_module, "accumulate_grad_batches", None)  # of manual optimization
        totals.append(trainer.max_steps * (own or trainer.accumulate_grad_batches))
    return min(totals, default=None)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=max(0, round(seconds))))


class RunReport(pl.Callback):
    """Log data, parameters, batch size and optimizers at the start of training, and steps and time at its end.

    rule: the text that explains the learning rate.
    """

    def __init__(self, rule: str = "") -> None:
        super().__init__()
        self.rule = rule

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the configs' settings of the optimizers: loading a checkpoint replaces them."""
        self._options = [_options(each) for each in trainer.optimizers]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._decay = _ema_decay(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start, self._first_step = time.monotonic(), trainer.global_step
        loop = trainer.fit_loop.epoch_loop
        # Lightning looks at them when a validation is due. On all ranks, which wait for each other here.
        if trainer.enable_validation and trainer.val_dataloaders is None:
            trainer.validating = True
            loop.val_loop.setup_data()
            trainer.training = True
        if not trainer.is_global_zero:
            return
        for board in trainer.loggers:
            if (resume_at := getattr(board, "resume_at", None)) is not None:
                resume_at(loop._batches_that_stepped, bool(getattr(trainer.fit_loop, "unfinished", False)))
        batches = trainer.num_training_batches
        per_epoch = f"{counted(int(batches), 'batch', 'batches')} per epoch" if math.isfinite(batches) else "a stream"
        validation = sum(count for count in trainer.num_val_batches if math.isfinite(count))
        logger.info("%-11s %s, %d of validation", "data", per_epoch, validation)
        parameters = list(pl_module.parameters())
        sizes = _count(parameters), _count([p for p in parameters if p.requires_grad])
        dtypes = "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters if p.is_floating_point()}))
        name = next(cls.__name__ for cls in type(pl_module).__mro__ if not issubclass(cls, FSDPModule))
        logger.info("%-11s %s, %s parameters, %s trainable, %s", "model", name, *sizes, dtypes)
        if isinstance(pl_module, DDPM):
            logger.info("%-11s %s", "objective", pl_module.describe_objective())
        if self.rule:
            logger.info("%-11s %s", "batch", self.rule)
        for number, optimizer in enumerate(trainer.optimizers, 1):
            self._log_optimizer(trainer, optimizer, number)
        if trainer.ckpt_path:
            self._log_kept(trainer, pl_module)
            place = f"step {trainer.global_step}, epoch {trainer.current_epoch}"
            logger.info("%-11s %s, from %s", "resumed", place, trainer.ckpt_path)

    def _log_optimizer(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer, number: int) -> None:
        groups, total = optimizer.param_groups, len(trainer.optimizers)
        now, rate = groups[0]["lr"], _rate(groups[0])
        scheduled = "" if now == rate else f", scheduled: {now:.3e} at step {trainer.global_step}"
        classes = class_names(optimizer)
        name = classes + (f" ({number} of {total})" if total > 1 else "")
        tensors = counted(sum(len(group["params"]) for group in groups), "tensor")
        logger.info("%-11s %s, learning rate %.3e%s, %s", "optimizer", name, rate, scheduled, tensors)
        for group in groups if len(groups) > 1 else ():
            kind = str(group["optimizer"]).rpartition(".")[2] if "+" in classes else ""
            name = group.get("name", "")
            label = name if kind in name else f"{kind}, {name}".removesuffix(", ")
            options = f", weight_decay {group['weight_decay']:g}" if "weight_decay" in group else ""
            size = f"{counted(len(group['params']), 'tensor')}, {_count(group['params'])} parameters"
            logger.info("%-11s %s: learning rate %.3e%s, %s", "group", label, _rate(group), options, size)

    def _log_kept(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what the checkpoint decides although the configs differ."""
        for configured, optimizer in zip(self._options, trainer.optimizers):
            for before, now, group in zip(configured, _options(optimizer), optimizer.param_groups):
                of = f" of {group['name']}" if "name" in group else ""
                for name, value in now.items():
                    if name in before and before[name] != value:
                        text = f"the checkpoint's {name} {value}{of} is used, not the configs' {before[name]}"
                        logger.warning("%-11s %s", "optimizer", text)
        decay = _ema_decay(pl_module)
        if decay is not None and self._decay is not None and decay != self._decay:
            text = f"the checkpoint's decay {decay:.6g} is used, not the configs' {self._decay:.6g}"
            logger.warning("%-11s %s", "EMA", text)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            seconds, steps = time.monotonic() - self._start, trainer.global_step - self._first_step
            rate = f", {steps / seconds:.2f} per second" if seconds > 0 and steps else ""
            last = "".join(f", {name} {value}" for name, value in _metrics(trainer, None).items())
            place = f"now at step {trainer.global_step}{last}"
            logger.info("%-11s %s in %s%s; %s", "trained", counted(steps, "step"), _clock(seconds), rate, place)


def _rate(group: Mapping[str, Any]) -> float:
    """Return the learning rate of a group of parameters without its schedule."""
    return float(group.get("initial_lr", group["lr"]))


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the settings of each group of parameters."""
    groups = zip(optimizer.param_groups, arguments_of(optimizer))
    return [{"learning rate": f"{_rate(group):.3e}", **arguments} for group, arguments in groups]


class CompileTime(pl.Callback):
    """Log how long the first step took, in which the network is compiled, and the second, in which it is not."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self._seconds: list[float] = []

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if len(self._seconds) > 1 or not trainer.is_global_zero:
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        self._seconds.append(time.monotonic() - self._start)
        if len(self._seconds) == 2:
            text = "the first batch took %.1f s with compilation by %s, the second %.2f s"
            logger.info(f"%-11s {text}", "compile", self._seconds[0], self.backend, self._seconds[1])


def _ema_decay(pl_module: pl.LightningModule) -> float | None:
    average = getattr(pl_module, "model_ema", None)
    decay = None if isinstance(average, PowerEma) else getattr(average, "decay", None)
    return float(decay) if isinstance(decay, Tensor) else None


def _count(parameters: list[nn.Parameter]) -> str:
    number = sum(p.numel() for p in parameters)
    return f"{number / 1e6:.2f} M" if number >= 10_000 else f"{number:,}"


class CUDACallback(pl.Callback):
    """Log the duration of every epoch and its peak memory, of the GPU or else of the process."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._device = trainer.strategy.root_device
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            torch.cuda.synchronize(self._device)
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not hasattr(self, "_start"):  # resumed in mid-epoch: Lightning starts no epoch then
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        cost = torch.tensor([time.monotonic() - self._start, _peak_mib(self._device)], device=self._device)
        seconds, memory = trainer.strategy.reduce(cost, reduce_op="mean").tolist()
        if trainer.is_global_zero:
            logger.info("%-11s %d took %.1f s, peak memory %.0f MiB", "epoch", trainer.current_epoch, seconds, memory)


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024  # bytes there, KiB elsewhere
