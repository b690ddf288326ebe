"""main.py --doctor: examine a training command without training, and report what it costs and what is wrong with it.

A problem is what would stop the run, or let it end without doing what its config says; a note is what works and may not
be meant. A check is a function that yields findings, named in CHECKS.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import default_collate

from ldm.callbacks import CheckpointPolicy, ImageLogger
from ldm.callbacks.data_check import image_size_problems, warn_of_long_captions
from ldm.checkpoint import CheckpointError, load_weights, read_weights, weights_on_meta
from ldm.cli import one_line
from ldm.config.consistency import consistency_problems
from ldm.config.instantiate import ConfigError, instantiate_from_config, value_at
from ldm.config.validate import WEIGHTS, check_class_count, weights_problems
from ldm.data.folder import ImageFolder
from ldm.data.image import BadImageError, load_image
from ldm.data.image_dataset import ImageDataset
from ldm.data.latents import use_cached_stages
from ldm.data.order import SeededDataset, usable_cpus
from ldm.data.shards import allow_pipes
from ldm.data.webdataset import ImageShards
from ldm.models.cached import LATENT, MOMENTS
from ldm.models.training import TrainedModule
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.modules.encoders import tokenizers
from ldm.modules.encoders.base import AbstractEncoder, PretrainedEncoder
from ldm.rng import preserve_rng
from ldm.training.devices import Devices, Machine, choose_devices
from ldm.training.flags import RunOptions
from ldm.training.footprint import Footprint, losses_of, make_optimizers, nbytes, step_footprint
from ldm.training.run import batches_of, build_data, quiet_lightning, this_machine
from ldm.training.run_directory import RunDirectory
from ldm.training.settings import LearningRate, RunSettings, check_batches, learning_rate
from ldm.training.strategies import REPLICAS
from ldm.training.trainer import build_trainer, check_trainer

logger = logging.getLogger(__name__)

SAMPLES = 10  # that are read
SMALL = 50_000_000  # parameters of a model up to which a step is computed with numbers
SMALL_FLOPS = 2e12  # of such a step, a few seconds on one core
IMAGES = 200  # whose size is read from their files
ENCODED, ENCODED_SIDE = 4, 128  # images, and pixels of their crop, that the first stage encodes
LATENT_STD = (0.5, 2.0)  # of scaled latents; those of published models are within 0.8 to 1.2
SCALED_LR = 0.05  # a learning rate multiplied by the batch size to more than this is a mistake
EFFICIENCY = 0.4  # of a training step, as a share of the speed of a matrix product
FAR_MORE_GPUS = 4096  # than a node has
LINE = 200  # characters of a warning
GIB = 2**30

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
    """A training command, and what is known of its run; parts that cannot be built are None or empty."""

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
        """The datasets by split, without `wrap`."""
        return {name: getattr(each, "data", each) for name, each in getattr(self.data, "datasets", {}).items()}

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

    def attempt(self, action: Callable[[], Value]) -> Value | None:
        """Return what `action` returns; None, and a problem, for an error that would end a run before it trains."""
        try:
            return action()
        except (ValueError, OSError, ImportError) as error:  # ConfigError is a ValueError
            self.findings.append(problem(one_line(error)))
            return None


def examine(
    options: RunOptions, directory: RunDirectory, config: DictConfig, settings: RunSettings
) -> tuple[str, bool]:
    """Examine a run as its merged config describes it; return the report and whether there is a problem.

    Nothing is written: neither run directory nor weights.
    """
    quiet_lightning(options.debug)
    if options.allow_pipe:
        allow_pipes()
    with _warnings() as warned:
        run = _examined(config, settings, directory)
        tokenizers.logger.setLevel(logging.NOTSET)
        if run.model is not None:
            for check in CHECKS:
                run.findings += check(run)
    run.findings += [note(text) for text in dict.fromkeys(warned)]
    return "\n".join(_report(run)), any(finding.is_problem for finding in run.findings)


# -------------------------------------------------------------------------------------------------- resolve and build


def _examined(config: DictConfig, settings: RunSettings, directory: RunDirectory) -> Examined:
    """Resolve a run in the order of `ldm.training.run.execute`, past the first problem."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    machine, wanted, where = this_machine(), settings.devices, settings.devices_where
    findings = []
    try:
        devices, here = choose_devices(wanted, machine, where), True
    except ConfigError as error:
        findings.append(problem(str(error)))
        try:
            devices, here = choose_devices(wanted, Machine(FAR_MORE_GPUS), where), False
        except ConfigError:
            devices, here = choose_devices({}, machine), True
        if devices.processes == FAR_MORE_GPUS:  # all GPUs
            devices, here = choose_devices({}, machine), True
    run = Examined(config, plain, settings, directory, devices, here, findings)
    inconsistent = [problem(text) for text in consistency_problems(plain)]
    run.findings += inconsistent
    if not (directory.resumed and directory.has_checkpoints):
        run.findings += [problem(text) for text in weights_problems(config)]
    run.rate = run.attempt(lambda: learning_rate(config, settings, run.ranks))
    before = len(run.findings)
    if here:
        run.attempt(lambda: check_trainer(settings, devices))
    valid_trainer = len(run.findings) == before
    pl.seed_everything(settings.seed, verbose=False)
    logger.info("%-11s the datasets, and %d samples", "reading", SAMPLES)
    run.data = run.attempt(lambda: build_data(config, settings, strict=False, prepare=False))
    if run.data is not None:
        run.attempt(lambda: check_batches(settings.trainer, batches_of(run.data, run.ranks)))
        run.attempt(lambda: check_class_count(config, run.datasets))
        run.attempt(lambda: _read_samples(run))
    logger.info("%-11s the model without weights", "building")
    run.model = run.attempt(lambda: _build_without_weights(config))
    if run.model is None:
        return run
    run.model.learning_rate = 1.0 if run.rate is None else run.rate.value
    quiet = replace(settings, trainer={**settings.trainer, "logger": False})
    cpu = Devices("cpu", 1, 1, "CPU")
    if valid_trainer:
        run.trainer = run.attempt(
            lambda: build_trainer(config, quiet, devices if here else cpu, directory, run.model, run.rate)
        )
    _count_long_captions(run)
    if run.batch is not None and not inconsistent and not any(_key_problems(run)):
        _step_without_data(run)
        _step_with_numbers(run)
    try:
        run.optimizers, run.schedulers = make_optimizers(run.model)
    except Exception as error:  # some need parameters with data
        run.findings.append(note(f"the optimizer is not examined: {one_line(error)}"))
    return run


def _build_without_weights(config: DictConfig) -> Any:
    """Build the model with parameters on the meta device, and without reading a file of weights."""
    node = _without_files(use_cached_stages(config))
    with weights_on_meta():
        return instantiate_from_config(node)


def _without_files(node: Any) -> Any:
    """Return a copy of a config in which no parameter names a file of weights."""
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node

    def forget(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: None if key in WEIGHTS else forget(each) for key, each in value.items()}
        return [forget(each) for each in value] if isinstance(value, list) else value

    return OmegaConf.create(forget(plain))


def _count_long_captions(run: Examined) -> None:
    """Log one warning, which becomes a note, for the captions that the text encoder truncates."""
    encoder = getattr(run.model, "cond_stage_model", None)
    if any(isinstance(data, ImageDataset) for data in run.datasets.values()):
        warn_of_long_captions(run.model, run.datasets)
    elif isinstance(run.batch, Mapping) and isinstance(encoder, AbstractEncoder):
        texts = run.batch.get(run.model.cond_stage_key)
        if isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
            encoder.warn_of_long_texts(texts)
    tokenizers.logger.setLevel(logging.ERROR)  # not again in every batch


def _read_samples(run: Examined) -> None:
    """Read samples that are spread evenly over the training data, as a data worker reads them."""
    dataset = run.datasets.get("train")
    start = time.perf_counter()
    if dataset is None or not len(getattr(dataset, "items", [1])):
        return
    if hasattr(dataset, "set_batch"):  # of images in buckets
        dataset.set_batch(run.batch_size * run.ranks)
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        seeded, count = SeededDataset(dataset, run.settings.seed), min(SAMPLES, len(dataset))
        places = [k * len(dataset) // count for k in range(count)]
        if getattr(dataset, "buckets", None) is not None:  # the images of a batch have one size
            dataset.set_batch(1)
            places = np.flatnonzero(dataset.bucket_of == dataset.bucket_of[0])[:count].tolist()
        samples = (seeded[place] for place in places)
    else:
        samples = (sample for sample, _ in zip(iter(dataset), range(SAMPLES)))
    with preserve_rng():
        run.samples = list(samples)
    run.sample_seconds = (time.perf_counter() - start) / max(1, len(run.samples))
    if run.samples and getattr(dataset, "buckets", None) is not None:  # images have several sizes: the largest
        run.samples = [max(run.samples, key=lambda sample: sum(getattr(x, "nbytes", 0) for x in sample.values()))]
    try:
        run.batch = default_collate(run.samples)
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"data.params.train: its samples do not fit into one batch: {one_line(error)}") from error


def _step_without_data(run: Examined) -> None:
    """Run a step of the whole model at its batch size on tensors without data."""
    logger.info("%-11s a step of the whole model, without data", "counting")
    try:
        run.footprint = step_footprint(run.model, run.batch, run.batch_size, run.precision)
    except (ValueError, TypeError, KeyError) as error:
        run.findings.append(problem(f"a training step fails: {one_line(error)}"))
    except NotImplementedError as error:
        run.findings.append(note(f"a training step is not examined: {one_line(error)}"))
    except Exception as error:
        shapes = isinstance(error, RuntimeError) and not type(error).__module__.startswith("torch._subclasses")
        text = f"a training step {'fails' if shapes else 'is not examined'}: {one_line(error)}"
        run.findings.append(problem(text) if shapes else note(text))


def _step_with_numbers(run: Examined) -> None:
    """Run forward and backward of two samples, if the model is small."""
    count = sum(parameter.numel() for parameter in run.model.parameters())
    rows = min(2, len(run.samples))
    if run.footprint is None:
        return
    if count > SMALL or run.footprint.flops / run.batch_size * rows > SMALL_FLOPS:
        reason = f"{count / 1e6:,.0f} M parameters" if count > SMALL else "large images"
        run.step_text = f"forward and backward without data at batch size {run.batch_size} ({reason})"
        return
    logger.info("%-11s a step of %d samples", "computing", rows)
    files = not any(each.is_problem and "ckpt_path" in each.text for each in run.findings)
    with preserve_rng():
        node = use_cached_stages(run.config)
        node = node if files else _without_files(node)
        model = run.attempt(lambda: instantiate_from_config(node))
        if model is None:
            return
        device = torch.device(run.devices.first if run.has_devices and run.devices.first != "auto" else "cpu")
        model.to(device).train()
        batch = default_collate(run.samples[:rows])
        seconds, norm = 0.0, 0.0
        values: list[float] = []
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            values = []
            for loss in losses_of(model, batch):
                if loss.requires_grad:
                    loss.backward()
                values.append(loss.item())
            norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            norm = float(torch.stack(norms).norm()) if norms else 0.0
            seconds = time.perf_counter() - start
            model.zero_grad()
    run.step_seconds = seconds / rows
    shown = " and ".join(f"{value:.4g}" for value in values)
    run.step_text = f"{rows} samples: loss {shown}, norm of the gradient {norm:.4g}, {seconds:.2f} s"
    if not all(map(math.isfinite, [*values, norm])):
        run.findings.append(problem(f"a training step has a loss of {shown} and a gradient of norm {norm:g}"))


# ---------------------------------------------------------------------------------------------------------- the checks


def check_keys(run: Examined) -> Iterator[Finding]:
    """Keys of the batch that the model reads, and what is in them."""
    yield from map(problem, _key_problems(run))
    key = getattr(run.model, "first_stage_key", None) or getattr(run.model, "image_key", None)
    image = run.samples[0].get(key) if run.samples and isinstance(run.samples[0], Mapping) else None
    if image is None or not (torch.is_tensor(image) or hasattr(image, "shape")):
        return
    low, high = float(image.min()), float(image.max())
    if key != "segmentation" and (high > 1.01 or low < -1.01):
        yield problem(f"data.params.train: {key} has values in [{low:g}, {high:g}]; scale it to [-1, 1]")
    latent = "first_stage_config" in run.params
    path = "model.params.first_stage_config.params.ddconfig" if latent else "model.params.ddconfig"
    given = value_at(run.plain, *path.split("."), "in_channels")
    channels = image.shape[-1] if len(image.shape) == 3 else 1
    if given is not None and given != channels:
        yield problem(f"{path}.in_channels {given}: {key} has {channels} channels; set it to {channels}")


def _key_problems(run: Examined) -> Iterator[str]:
    if run.samples and not isinstance(run.samples[0], Mapping):
        yield f"data.params.train: its samples are of type {type(run.samples[0]).__name__}; expected dicts"
        return
    sample: Mapping[str, Any] = run.samples[0] if run.samples else {}
    images = [key for key, value in sample.items() if getattr(value, "ndim", 0) == 3]
    texts = [key for key, value in sample.items() if isinstance(value, str) and key != "file_path_"]
    numbers = [key for key, value in sample.items() if isinstance(value, int)]
    encoder = getattr(run.model, "cond_stage_model", None)
    wanted = {"first_stage_key": images, "image_key": images, "adm_key": numbers}
    if encoder is not None and getattr(getattr(run.model, "model", None), "conditioning_key", None) is not None:
        labels = hasattr(encoder, "embedding") and hasattr(encoder, "key")
        wanted["cond_stage_key"] = numbers if labels else texts if isinstance(encoder, AbstractEncoder) else images
        if labels and encoder.key in sample:
            del wanted["cond_stage_key"]
    if {MOMENTS, LATENT} & set(sample):  # of a cache
        del wanted["first_stage_key"]
    for name, choices in wanted.items() if sample else ():
        key = getattr(run.model, name, None)
        if isinstance(key, str) and key not in sample:
            advice = f"set model.params.{name}={choices[0]}" if choices else "let the dataset return it"
            yield f"model.params.{name} {key}: the samples have no such key, but {', '.join(sample)}; {advice}"


def check_image_sizes(run: Examined) -> Iterator[Finding]:
    """Images whose size the model cannot process, and files that are smaller than the size."""
    yield from map(problem, image_size_problems(run.model, run.datasets))
    data = run.datasets.get("train")
    if not isinstance(data, ImageDataset) or data.buckets is not None:
        return
    name, sides = ("crop_size", data.crop_size) if data.size is None else ("size", data.size)
    found: list[int] = []
    every = max(1, len(data) // IMAGES)
    if isinstance(data, ImageShards):
        found = [int(side) for side in data.sizes[::every].min(axis=1)]
    elif isinstance(data, ImageFolder):
        try:
            found = [min(load_image(data.root / each.name, data.max_pixels).size) for each in data.items[::every]]
        except BadImageError as error:
            if run.batch is not None:  # else reading the samples reported it
                yield problem(f"data.params.train.params.on_error raise: {one_line(error)}")
    small = [side for side in found if side < min(sides)]
    if small:
        text = f"data.params.train.params.{name} {min(sides)}: {len(small)} of {len(found)} images are smaller and are "
        text += f"enlarged, the smallest has {min(small)} pixels; "
        if 2 * len(small) > len(found):
            yield problem(f"{text}set it to {max(64, min(small) // 64 * 64)}, or use larger images")
        else:
            place = "data.params.train.params"
            yield note(f"{text}{place}.min_size={min(sides)} with {place}.on_error=skip leaves them out")


def check_text_dropout(run: Examined) -> Iterator[Finding]:
    encoder = getattr(run.model, "cond_stage_model", None)
    if isinstance(encoder, AbstractEncoder) and not run.params.get("cond_dropout"):
        text = "no sample trains the unconditional network, which guidance needs; 0.1 is the published share"
        yield note(f"model.params.cond_dropout 0: {text}")


def check_frozen_stages(run: Examined) -> Iterator[Finding]:
    """Frozen stages whose weights are in no file."""
    base, resumed = run.params.get("ckpt_path"), run.directory.resumed and run.directory.has_checkpoints
    first, stage = getattr(run.model, "first_stage_model", None), getattr(run.model, "cond_stage_model", None)
    own = value_at(run.params, "first_stage_config", "params", "ckpt_path")
    if resumed:
        return
    if isinstance(first, TrainedModule) and not (base or own or run.params.get("untrained_first_stage")):
        place = "model.params.first_stage_config.params.ckpt_path"
        yield problem(f"{place}: not set, and the first stage is frozen; set {place} to the weights of a first stage")
    if base and not Path(base).exists():
        return
    names = _names_in(base) if base else []
    held = any(name.startswith("cond_stage_model.") for name in names)
    if not isinstance(stage, torch.nn.Module) or stage is first or held or run.params.get("cond_stage_trainable"):
        return
    if isinstance(stage, PretrainedEncoder):
        version = getattr(stage, "version", "") or getattr(stage, "arch", "")
        if not Path(str(version)).is_dir():
            name = f"{type(stage).__name__} ({version})"
            yield note(f"model.params.cond_stage_config: the weights of {name} come from the hub or its cache")
    elif any(True for _ in stage.parameters()):
        name = type(stage).__name__
        advice = "set model.params.cond_stage_trainable=true, or model.params.ckpt_path to its weights"
        yield problem(f"model.params.cond_stage_trainable false: {name} has random weights; {advice}")


def _names_in(path: str) -> list[str]:
    try:
        return list(read_weights(path))
    except (CheckpointError, OSError):
        return []  # `check_first_stage_scale` reports it


def check_first_stage_scale(run: Examined) -> Iterator[Finding]:
    """The standard deviation of scaled latents, which the noise schedule expects near 1."""
    stage, key = getattr(run.model, "first_stage_model", None), getattr(run.model, "first_stage_key", "")
    own, base = value_at(run.params, "first_stage_config", "params", "ckpt_path"), run.params.get("ckpt_path")
    file = own or base
    if not isinstance(stage, TrainedModule) or file is None or not Path(file).exists() or not run.samples:
        return
    try:
        std = _latent_std(run, str(base) if own is None else None, key)
    except (CheckpointError, ValueError, RuntimeError) as error:
        yield problem(f"model.params.first_stage_config: {one_line(error)}")
        return
    scale = 1.0 if run.params.get("scale_by_std") else float(run.params.get("scale_factor", 1.0))
    measured = f"std {std * scale:.3g} over {min(ENCODED, len(run.samples))} crops"
    if run.params.get("scale_by_std"):
        run.latent_text = f"{measured}, unscaled; scale_by_std divides by it"
        return
    run.latent_text = f"{measured}, at scale_factor {scale:g}"
    if not LATENT_STD[0] <= std * scale <= LATENT_STD[1]:
        text = f"scaled latents have a standard deviation of {std * scale:.3g}; expected about 1"
        yield problem(f"model.params.scale_factor {scale:g}: {text}; set it to {1 / std:.3g}")


@torch.no_grad()
def _latent_std(run: Examined, base: str | None, key: str) -> float:
    """Return the standard deviation of unscaled latents of central crops; base: a file that holds the whole model."""
    config = run.params["first_stage_config"]
    if base is None:
        stage: Any = instantiate_from_config(config)
    else:
        with weights_on_meta():
            stage = instantiate_from_config(config)
        prefix = "first_stage_model."
        weights = {name[len(prefix) :]: x for name, x in read_weights(base).items() if name.startswith(prefix)}
        if not weights:
            raise ConfigError(f"{base} holds no first stage; set model.params.first_stage_config.params.ckpt_path")
        load_weights(stage, base, weights=weights)
    images = torch.stack([torch.as_tensor(sample[key]) for sample in run.samples[:ENCODED]]).permute(0, 3, 1, 2)
    top, left = (max(0, (side - ENCODED_SIDE) // 2) for side in images.shape[2:])
    found = stage.eval().encode(images[..., top : top + ENCODED_SIDE, left : left + ENCODED_SIDE].float())
    latents: Tensor = found.sample() if isinstance(found, DiagonalGaussianDistribution) else found
    return float(latents.float().std())


def check_discriminator(run: Examined) -> Iterator[Finding]:
    start, steps = value_at(run.params, "lossconfig", "params", "disc_start"), run.steps
    if not isinstance(start, int) or steps is None or not getattr(run.model, "adversarial", False):
        return
    place = "model.params.lossconfig.params.disc_start"
    if start >= steps:
        text = f"the run ends at step {steps:,}, before the discriminator starts"
        yield problem(f"{place} {start}: {text}; set it to {steps // 2}, or {run.run_length} higher")
    elif start > 0.8 * steps:
        yield note(f"{place} {start}: the discriminator trains in the last {steps - start:,} of {steps:,} steps only")


def check_ema(run: Examined) -> Iterator[Finding]:
    """Averages that still hold the initial weights at the end of the run."""
    for name, ema in run.model.named_children():
        if not isinstance(ema, LitEma) or not run.steps:
            continue
        decay, warm_up = float(ema.decay), int(ema.num_updates) >= 0
        left = 0.0  # log of the share of the initial weights
        for n in range(1, min(run.steps, 200_000) + 1):
            step = min(decay, (1 + n) / (10 + n)) if warm_up else decay
            left += math.log(step) if step else -math.inf
        if math.exp(left) > 0.1:
            share, fitting = math.exp(left), 1 - round(10 / run.steps, 6)
            place = "model.params.ema_decay"
            text = f"after {run.steps:,} steps {share:.0%} of the average {name} are still the initial weights"
            advice = f"set it to {max(0.0, fitting):g}, or model.params.use_ema=false"
            yield problem(f"{place} {decay:g}: {text}; {advice}")


def check_learning_rate(run: Examined) -> Iterator[Finding]:
    """The scaled rate, and a schedule that does not fit into the run."""
    if run.rate is not None and run.settings.scale_lr and run.rate.value > SCALED_LR:
        base = float(run.plain["model"]["base_learning_rate"])
        text = f"multiplied by the effective batch it is {run.rate.value:.3g}"
        yield problem(f"model.base_learning_rate {base:g}: {text}; set lightning.scale_lr=false")
    factors, place = _schedule(run), "model.params.scheduler_config.params"
    if factors is None or not run.steps:
        return
    steps, given = run.steps, value_at(run.params, "scheduler_config", "params") or {}
    places = [steps * k // 200 for k in range(201)]
    values = [factors(step) for step in places]
    later = max(factors(steps * k) for k in range(1, 21))
    if max(values) < 0.9 * later:
        warm_up = given.get("warm_up_steps")
        text = f"the run ends at step {steps:,}, when the rate is {values[-1]:.0%} of the configured one"
        fitting = max(1, steps // 20)
        fitting_text = f"[{fitting}]" if isinstance(warm_up, list) else fitting
        yield problem(f"{place}.warm_up_steps {warm_up}: {text}; set it to {fitting_text}")
        return
    peak = max(values)
    ended = next((k for k in range(201) if all(value <= 0.011 * peak for value in values[k:])), 201)
    if ended < 160:
        name = next((name for name in ("max_decay_steps", "cycle_lengths") if name in given), "")
        fitting_text = f"[{steps}]" if isinstance(given.get(name), list) else steps
        text = f"the rate is at its end from step {places[ended]:,} of {steps:,} on; set it to {fitting_text}"
        yield problem(f"{place}.{name} {given.get(name)}: {text}" if name else f"{place}: {text}")


def _schedule(run: Examined) -> Callable[[int], float] | None:
    """Return the multiplier of the learning rate at a step; None without a schedule that is a function of it."""
    schedule = run.schedulers[0] if run.schedulers else None
    return schedule.lr_lambdas[0] if isinstance(schedule, LambdaLR) else None


def check_intervals(run: Examined) -> Iterator[Finding]:
    """Validation, image logs and accumulation against the length of an epoch and of the run."""
    trainer, steps, batches = run.trainer, run.steps, run.batches
    if trainer is None or not batches:
        return
    if run.accumulated > batches:
        text = f"an epoch has {batches} batches, so a step takes {batches}"
        yield note(f"lightning.trainer.accumulate_grad_batches {run.accumulated}: {text}")
    size = run.batch_size * run.ranks
    samples = len(run.datasets["train"]) if hasattr(run.datasets.get("train"), "__len__") else size
    if samples < size:
        place = f"data.params.batch_size {run.batch_size}"
        yield note(f"{place}: the training data has {samples} samples, so an epoch is one batch of {samples}")
    if steps is None:
        return
    if "validation" in run.datasets:
        every = trainer.val_check_interval
        epochs = trainer.check_val_every_n_epoch or 1
        first = every if isinstance(every, int) else math.ceil(batches * (epochs - 1 + (every or 1.0)))
        if steps * run.accumulated < first:
            fitting = max(1, min(batches, steps * run.accumulated // 4))
            text = f"the run ends at batch {steps * run.accumulated:,}, before the first validation at {first:,}"
            advice = f"set lightning.trainer.val_check_interval={fitting}"
            advice += " and lightning.trainer.check_val_every_n_epoch=1" if epochs > 1 else ""
            yield problem(f"lightning.trainer.val_check_interval {every}: {text}; {advice}")
    elif (monitor := str(getattr(run.model, "monitor", ""))).startswith("val"):
        yield note(f"data.params.validation: not set; {monitor} is not logged, so only last.ckpt is kept")
    callbacks: list[Any] = getattr(trainer, "callbacks", [])  # Lightning does not declare it
    for images in callbacks:
        if isinstance(images, ImageLogger) and not images.disabled and not any(map(images.is_due, range(steps))):
            place = "lightning.callbacks.image_logger.params.batch_frequency"
            text = f"the run of {steps:,} steps ends before the first image log; set it to {max(1, steps // 4)}"
            yield note(f"{place} {images.batch_freq}: {text}")


def check_memory(run: Examined) -> Iterator[Finding]:
    rows, available = memory_rows(run), device_memory(run)
    total = sum(size for _, size in rows)
    if run.footprint is None or available is None or total <= available:
        return
    fixed = total - run.footprint.activations
    fitting = int((available - fixed) * run.batch_size / max(1, run.footprint.activations))
    text = f"data.params.batch_size {run.batch_size}: needs {_size(total)}, the device has {_size(available)}"
    if 1 <= fitting < run.batch_size:
        more = math.ceil(run.accumulated * run.batch_size / fitting)
        advice = f"set it to {fitting}, with lightning.trainer.accumulate_grad_batches={more} for the same step"
    else:
        advice = f"one sample needs {_size(fixed + run.footprint.activations // run.batch_size)}"
        options = ["a larger device", "--precision bf16-mixed", "adapters (docs/lora.md)"]
        options += ["model.params.use_ema=false"] if getattr(run.model, "use_ema", False) else []
        advice += f"; choose {', '.join(options[:-1])} or {options[-1]}"
    yield problem(f"{text}; {advice}")


def check_workers(run: Examined) -> Iterator[Finding]:
    workers, cpus = getattr(run.data, "num_workers", None), usable_cpus()
    given = value_at(run.plain, "data", "params", "num_workers")
    if not isinstance(workers, int):
        return
    per_rank = max(1, cpus // run.devices.processes)
    if given is not None and workers > per_rank and run.has_devices:
        text = f"{cpus} CPUs for {run.devices.processes} ranks; set it to {per_rank}"
        yield note(f"data.params.num_workers {workers}: {text}")
    seconds = expected_step(run)
    if seconds and run.sample_seconds and run.has_devices:
        needed = run.batch_size * run.accumulated / seconds
        supplied = max(1, min(workers, per_rank)) / run.sample_seconds
        if supplied < needed:
            text = f"data workers read about {supplied:.0f} samples/s, and the model takes {needed:.0f}"
            yield note(f"data.params.num_workers {workers}: {text}; use smaller images or cached latents")


def check_gradients(run: Examined) -> Iterator[Finding]:
    """Trainable parameters that a step does not reach, for which DistributedDataParallel waits without end."""
    missing = run.footprint.without_gradient if run.footprint is not None else ()
    if not missing:
        return
    strategy = str(run.settings.trainer.get("strategy", "ddp" if run.ranks > 1 else "auto"))
    text = f"a step reaches {len(missing)} trainable parameters not at all, the first is {missing[0]}"
    if run.ranks > 1 and strategy == "ddp" and run.model.automatic_optimization:
        yield problem(f"lightning.trainer.strategy ddp: {text}; set it to ddp_find_unused_parameters_true")
    else:
        yield note(text)


def check_disk(run: Examined) -> Iterator[Finding]:
    callbacks: list[Any] = getattr(run.trainer, "callbacks", [])  # Lightning does not declare it
    policy = next((each for each in callbacks if isinstance(each, CheckpointPolicy)), None)
    if policy is None or run.footprint is None:
        return
    file = checkpoint_size(run)
    newest = 1 + policy.copy_last if policy.save_last else 0
    best = policy.save_top_k if policy.save_top_k >= 0 else 3
    folder = next(path for path in (run.directory.path, *run.directory.path.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(folder).free, (newest + best) * file
    if needed > free:
        text = f"{newest + best} checkpoints of {_size(file)} take {_size(needed)}, and {folder} has {_size(free)}"
        fitting = free // file - newest
        place = "lightning.modelcheckpoint.params.save_top_k"
        advice = f"set it to {fitting}" if fitting >= 0 else "set --logdir to a larger file system"
        yield problem(f"{place} {policy.save_top_k}: {text}; {advice}")


Check = Callable[[Examined], Iterator[Finding]]
CHECKS: Sequence[Check] = (
    check_keys,
    check_image_sizes,
    check_text_dropout,
    check_frozen_stages,
    check_first_stage_scale,
    check_discriminator,
    check_ema,
    check_learning_rate,
    check_intervals,
    check_memory,
    check_workers,
    check_gradients,
    check_disk,
)


# ----------------------------------------------------------------------------------------------------------- estimates


def memory_rows(run: Examined) -> list[tuple[str, int]]:
    """Return the parts of the memory of one device, in bytes."""
    if run.footprint is None:
        return []
    rows: dict[str, int] = {"weights, trained": 0}
    averages = [module for _, module in _averages(run.model)]
    inside = {id(tensor) for module in averages for tensor in module.buffers()}
    for name, parameter in run.model.named_parameters():
        part = name.partition(".")[0].removesuffix("_model").replace("_", " ")
        row = "weights, trained" if parameter.requires_grad else f"weights, {part} (frozen)"
        rows[row] = rows.get(row, 0) + nbytes(parameter)
    state = run.footprint.optimizer
    rows["gradients"] = run.footprint.gradients
    rows["optimizer"] = 2 * run.footprint.gradients if state is None else state
    rows["EMA"] = sum(nbytes(tensor) for module in averages for tensor in module.buffers())
    strategy = str(run.settings.trainer.get("strategy", "ddp" if run.ranks > 1 else "auto"))
    if strategy.startswith("ddp") and strategy not in REPLICAS and run.ranks > 1:
        rows["gradients, exchanged by DDP"] = run.footprint.gradients
    if strategy.startswith("fsdp"):
        for row in ("weights, trained", "gradients", "optimizer", "EMA"):
            rows[row] //= run.ranks
    rows["buffers"] = sum(nbytes(tensor) for tensor in run.model.buffers() if id(tensor) not in inside)
    rows["activations"] = run.footprint.activations
    return [(name, size) for name, size in rows.items() if size >= 2**20 or name == "activations"]


def _averages(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_children() if isinstance(module, LitEma)]


def device_memory(run: Examined) -> int | None:
    """Return the memory of the first device in bytes; None if it is not here."""
    if not run.has_devices:
        return None
    if run.devices.accelerator == "cuda":
        return int(torch.cuda.get_device_properties(run.devices.first).total_memory)
    if run.devices.accelerator == "mps":
        return int(torch.mps.recommended_max_memory())
    if not hasattr(os, "sysconf"):
        return None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # of a container
        if Path(file).is_file() and (text := Path(file).read_text().strip()).isdigit():
            memory = min(memory, int(text))
    return memory // run.devices.processes


def checkpoint_size(run: Examined) -> int:
    """Return the bytes of a checkpoint: weights, averages and the optimizer's state; of adapters, these alone."""
    assert run.footprint is not None
    state: Mapping[str, Tensor] = run.model.state_dict(keep_vars=True)
    own = run.model.adapter_keys() if getattr(run.model, "trains_adapters", False) else state.keys()
    return sum(nbytes(state[name]) for name in own) + (run.footprint.optimizer or 2 * run.footprint.gradients)


def expected_step(run: Examined) -> float | None:
    """Return the seconds of an optimizer step, from the step with numbers, or else from its operations."""
    if run.footprint is None or not run.has_devices:
        return None
    samples = run.batch_size * run.accumulated
    if run.step_seconds is not None:
        return run.step_seconds * samples
    return run.footprint.flops * run.accumulated / (EFFICIENCY * _speed(run))


_speeds: dict[tuple[str, torch.dtype], float] = {}


def _speed(run: Examined) -> float:
    """Return the floating-point operations per second of a matrix product in the run's precision."""
    dtype = torch.float32 if run.precision.startswith(("32", "64")) else torch.bfloat16
    name = run.devices.first if run.devices.first != "auto" else "cpu"
    if (name, dtype) not in _speeds:
        side = 1024 if name == "cpu" else 8192
        a = torch.ones(side, side, dtype=dtype, device=name)
        best = math.inf
        for _ in range(4):
            start = time.perf_counter()
            float((a @ a)[0, 0])  # waits for the device
            best = min(best, time.perf_counter() - start)
        _speeds[name, dtype] = 2 * side**3 / best
    return _speeds[name, dtype]


# -------------------------------------------------------------------------------------------------------------- report


def _report(run: Examined) -> Iterator[str]:
    if run.model is not None:
        yield from _parameters(run)
    yield from _training(run)
    if run.footprint is not None:
        yield from _memory(run)
    for title, kind in (("problems", True), ("notes", False)):
        lines = [finding.text for finding in run.findings if finding.is_problem == kind]
        if lines or kind:
            yield f"{title}: {len(lines) or 'none'}"
            yield from (f"  {line}" for line in lines)


def _parameters(run: Examined) -> Iterator[str]:
    yield f"{'parameters':28}{'all':>15}{'trainable':>15}{'frozen':>15}"
    total, seen = [0, 0], set[int]()
    for name, part in run.model.named_children():
        own = {id(p): p for p in part.parameters() if id(p) not in seen}
        counts = [sum(p.numel() for p in own.values() if p.requires_grad == trained) for trained in (True, False)]
        seen |= own.keys()
        total = [a + b for a, b in zip(total, counts)]
        if any(counts):
            yield f"  {name:26}{sum(counts):15,}{counts[0]:15,}{counts[1]:15,}"
    yield f"  {'sum':26}{sum(total):15,}{total[0]:15,}{total[1]:15,}"


def _training(run: Examined) -> Iterator[str]:
    yield "training"
    nodes = f", {run.settings.num_nodes} nodes" if run.settings.num_nodes > 1 else ""
    rows = {"device": f"{run.devices.text}{nodes}, precision {run.precision}"}
    if run.rate is not None:
        rows["effective batch"], _, rows["learning rate"] = run.rate.rule.partition("; ")
        rows["effective batch"] = rows["effective batch"].removeprefix("effective batch ")
        rows["learning rate"] = rows["learning rate"].removeprefix("learning rate ")
    rows["optimizer"] = _optimizer_text(run)
    data = run.datasets.get("train")
    if run.samples:
        size = f"{len(data):,} samples" if isinstance(data, Sized) else "a stream"
        rows["data"] = f"{size}; {len(run.samples)} read in {run.sample_seconds * len(run.samples):.2f} s"
    if run.epoch_steps:
        rows["epoch"] = f"{_count(run.batches or 0, 'batch', 'batches')}, {_count(run.epoch_steps, 'step')}"
    if run.steps is not None:
        epochs = f", {run.steps / run.epoch_steps:,.1f} epochs" if run.epoch_steps else ""
        rows["run"] = f"{_count(run.steps, 'step')}{epochs}"
    if run.latent_text:
        rows["latents"] = run.latent_text
    rows["step"] = run.step_text
    if seconds := expected_step(run):
        source = f"the step of {min(2, len(run.samples))} samples" if run.step_seconds else _speed_text(run)
        whole = f", {_duration(seconds * run.steps)} for the run" if run.steps else ""
        rows["time, estimated"] = f"{_duration(seconds)} for a step{whole}, from {source}"
    if run.footprint is not None:
        rows["checkpoint"] = _size(checkpoint_size(run))
    yield from (f"  {name:26}{text}" for name, text in rows.items())


def _speed_text(run: Examined) -> str:
    assert run.footprint is not None
    count = run.footprint.flops * run.accumulated / 1e12
    return f"{count:,.1f} TFLOP at {EFFICIENCY:.0%} of {_speed(run) / 1e12:,.2f} TFLOP/s of a matrix product here"


def _optimizer_text(run: Examined) -> str:
    texts = []
    for optimizer in run.optimizers:
        rates = dict.fromkeys(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
        texts.append(f"{type(optimizer).__name__}, learning rate {', '.join(f'{rate:.3e}' for rate in rates)}")
    factors, steps = _schedule(run), run.steps
    if texts and factors is not None and steps:
        texts[0] += f", times {factors(0):.3g} at step 0, {factors(steps // 2):.3g} at {steps // 2:,}"
        texts[0] += f", {factors(steps):.3g} at the end"
    return "; ".join(texts) or "unknown"


def _memory(run: Examined) -> Iterator[str]:
    yield f"memory of one device, computed from shapes at batch size {run.batch_size} (not measured)"
    rows = memory_rows(run)
    yield from (f"  {name:34}{_size(size):>12}" for name, size in rows)
    available = device_memory(run)
    of = f" of {_size(available)}" if available else ""
    yield f"  {'sum':34}{_size(sum(size for _, size in rows)):>12}{of}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _size(count: int) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:,.1f} days"
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect this package's warnings, which the console then does not show."""
    package, texts = logging.getLogger("ldm"), []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if record.name == tokenizers.logger.name:
                text = f"data.params.train: {text}"
            elif str(record.msg).startswith("%-11s ") and isinstance(record.args, tuple):
                text = text[len(f"{record.args[0]!s:11} ") :]  # without the word that begins a log line
            text = " ".join(text.split())
            texts.append(text if len(text) <= LINE else f"{text[:LINE]} ...")

    collect, handlers = Collect(logging.WARNING), list(package.handlers)

    def below(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING

    package.addHandler(collect)
    for handler in handlers:
        handler.addFilter(below)
    try:
        yield texts
    finally:
        package.removeHandler(collect)
        for handler in handlers:
            handler.removeFilter(below)
