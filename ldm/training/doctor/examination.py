"""Resolve, build and try a training run in the order of `ldm.training.run.execute`, past its first problem."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import default_collate

from ldm.callbacks import ImageLogger, LossBySNR
from ldm.callbacks.data_check import warn_of_long_captions
from ldm.checkpoint import weights_on_meta
from ldm.cli import counted, one_line
from ldm.config.consistency import consistency_problems
from ldm.config.instantiate import ConfigError, instantiate_from_config
from ldm.config.validate import WEIGHTS, check_class_count, weights_problems
from ldm.data.image_dataset import ImageDataset
from ldm.data.latents import use_cached_stages
from ldm.data.order import SeededDataset
from ldm.data.shards import allow_pipes
from ldm.modules.encoders import tokenizers
from ldm.modules.encoders.base import AbstractEncoder
from ldm.rng import preserve_rng
from ldm.training.class_images import lacking_class_images
from ldm.training.devices import Devices, Machine, choose_devices
from ldm.training.doctor.checks import CHECKS, key_problems
from ldm.training.doctor.examined import Examined, Finding, note, problem
from ldm.training.doctor.footprint import configured_optimizers, losses_of, step_footprint
from ldm.training.doctor.report import report_lines
from ldm.training.flags import RunOptions
from ldm.training.run import batches_of, build_data, compile_network, quiet_lightning, this_machine
from ldm.training.run_directory import RunDirectory
from ldm.training.settings import RunSettings, check_batches, learning_rate
from ldm.training.strategies import check_shardable
from ldm.training.trainer import build_trainer, check_trainer

logger = logging.getLogger(__name__)

SAMPLES = 10  # of the training data, read and collated
SMALL = 50_000_000  # parameters of the largest model that computes a step with numbers
SMALL_FLOPS = 2e12  # operations of the largest step with numbers: a few seconds on one core
MANY_GPUS = 4096  # more than a node has: devices that this machine lacks are resolved as if it had them
LINE = 200  # characters of a warning in the report


def examine(
    options: RunOptions, directory: RunDirectory, config: DictConfig, settings: RunSettings
) -> tuple[str, bool]:
    """Examine a run as its merged config describes it; return the report and whether there is a problem.

    Nothing is written: neither run directory nor weights.
    """
    quiet_lightning(options.debug)
    if options.allow_pipe:
        allow_pipes()
    with _collected_warnings() as warned:
        run = _examined(config, settings, directory)
        tokenizers.logger.setLevel(logging.NOTSET)
        if run.model is not None:
            for check in CHECKS:
                run.findings += check(run)
    run.findings += [note(text) for text in dict.fromkeys(warned)]
    return "\n".join(report_lines(run)), any(finding.is_problem for finding in run.findings)


def _examined(config: DictConfig, settings: RunSettings, directory: RunDirectory) -> Examined:
    config, findings = _without_missing_class_images(config)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    machine, wanted, where = this_machine(), settings.devices, settings.devices_where
    try:
        devices, here = choose_devices(wanted, machine, where), True
    except ConfigError as error:
        findings.append(problem(str(error)))
        try:
            devices, here = choose_devices(wanted, Machine(MANY_GPUS), where), False
        except ConfigError:
            devices, here = choose_devices({}, machine), True
        if devices.processes == MANY_GPUS:  # all GPUs
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
    if run.batch is not None and not inconsistent and not any(key_problems(run)):
        _step_without_data(run)
        _step_with_numbers(run)
    _refusals_of_the_run(run)
    try:
        run.optimizers, run.schedulers = configured_optimizers(run.model)
    except ConfigError as error:
        run.findings.append(problem(one_line(error)))
    except Exception as error:  # some need parameters with data
        run.findings.append(note(f"the optimizer is not examined: {one_line(error)}"))
    return run


def _without_missing_class_images(config: DictConfig) -> tuple[DictConfig, list[Finding]]:
    """Return the config without the class images that the run generates first, and what is to be said about them."""
    findings, config = [], copy.deepcopy(config)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    base = OmegaConf.select(config, "model.params.ckpt_path")
    for path, text in lacking_class_images(plain):
        if base is None:
            findings.append(problem(f"{path}: {text}; set model.params.ckpt_path to the weights that generate them"))
        else:
            findings.append(
                note(f"{path}: {text}; the run generates them first; data and epochs are counted without them")
            )
        OmegaConf.update(config, path, None)
    return config, findings


def _refusals_of_the_run(run: Examined) -> None:
    """Call the checks of strategy, compilation and callbacks, which a run makes once its model is built."""
    if run.strategy == "fsdp":
        run.attempt(lambda: check_shardable(run.model))
    if (backend := run.settings.compile) is not None:
        run.attempt(lambda: compile_network(run.model, backend, run.devices.accelerator))
    callbacks: list[pl.Callback] = getattr(run.trainer, "callbacks", [])  # Lightning does not declare it
    for callback in callbacks:
        if run.trainer is not None and isinstance(callback, ImageLogger | LossBySNR):
            run.attempt(partial(callback.setup, run.trainer, run.model, "fit"))


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

    return OmegaConf.create({"model": forget(plain)}).model  # its nodes know their paths in the YAML


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
            places = np.flatnonzero(dataset.bucket_of == np.bincount(dataset.bucket_of).argmax())[:count].tolist()
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
    logger.info("%-11s a step of %s", "computing", counted(rows, "sample"))
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
    run.step_text = f"{counted(rows, 'sample')}: loss {shown}, norm of the gradient {norm:.4g}, {seconds:.2f} s"
    if not all(map(math.isfinite, [*values, norm])):
        run.findings.append(problem(f"a training step has a loss of {shown} and a gradient of norm {norm:g}"))


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
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
