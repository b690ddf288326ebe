"""The checks of a training run: each yields a finding for what would stop the run, or what may not be meant."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.callbacks import CheckpointPolicy, ImageLogger
from ldm.callbacks.data_check import image_size_problems, pixel_multiple, single_buckets
from ldm.checkpoint import CheckpointError, load_weights, read_weights, weights_on_meta
from ldm.cli import counted, one_line
from ldm.config.consistency import ADAPTERS
from ldm.config.instantiate import ConfigError, instantiate_from_config, value_at
from ldm.config.signature import constructor_arguments
from ldm.data.folder import ImageFolder
from ldm.data.image import BadImageError, load_image
from ldm.data.image_dataset import ImageDataset
from ldm.data.order import usable_cpus
from ldm.data.webdataset import ImageShards
from ldm.models.cached import LATENT, MOMENTS
from ldm.models.training import TrainedModule
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma, PowerEma
from ldm.modules.encoders.base import AbstractEncoder, PretrainedEncoder
from ldm.training.doctor.estimates import checkpoint_size, device_memory, expected_step, memory_rows, size_text
from ldm.training.doctor.examined import Examined, Finding, note, problem

IMAGES = 200  # whose size is read from their files
ENCODED, ENCODED_SIDE = 4, 128  # images, and pixels of their crop, that the first stage encodes
LATENT_STD = (0.5, 2.0)  # of scaled latents; those of published models are within 0.8 to 1.2
SCALED_LR = 0.05  # a learning rate that the effective batch multiplies to more than this is a mistake


def check_keys(run: Examined) -> Iterator[Finding]:
    """Keys of the batch that the model reads, their range and channels."""
    yield from map(problem, key_problems(run))
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


def key_problems(run: Examined) -> Iterator[str]:
    """Yield a line for every key that the model reads and the samples lack."""
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
    yield from map(note, single_buckets(run.model, run.datasets))
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
            multiple = math.prod(pixel_multiple(run.model))
            fitting = min(small) // multiple * multiple
            yield problem(f"{text}{f'set it to {fitting}, or ' if fitting else ''}use larger images")
        else:
            place = "data.params.train.params"
            yield note(f"{text}{place}.min_size={min(sides)} with {place}.on_error=skip leaves them out")


def check_text_dropout(run: Examined) -> Iterator[Finding]:
    """Captions that are never dropped, as classifier-free guidance needs."""
    encoder = getattr(run.model, "cond_stage_model", None)
    subject = str(value_at(run.plain, "data", "params", "train", "target")).endswith(".DreamBooth")
    tokens_alone = run.params.get("token_embeddings") is not None and run.params.get("adapters") is None
    if subject or tokens_alone:  # published without: few steps, on a base that was trained with it
        return
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
    network = [parameter.requires_grad for parameter in getattr(run.model, "model", run.model).parameters()]
    if not base and not any(network):
        if not any(run.params.get(name) is not None for name in ADAPTERS):  # else `weights_problems` reported it
            place = "model.params.ckpt_path"
            yield problem(f"{place}: not set, and the network is frozen; set {place} to the weights of a whole model")
        return
    if isinstance(first, TrainedModule) and not (base or own or run.params.get("untrained_first_stage")):
        place = "model.params.first_stage_config.params.ckpt_path"
        whole = ", or model.params.ckpt_path to those of a whole model" if "ckpt_path" in run.params else ""
        text = "not set, and the first stage is frozen"
        yield problem(f"{place}: {text}; set {place} to the weights of a first stage{whole}")
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
    if any(each.is_problem and str(file) in each.text for each in run.findings):  # e.g. it is a run directory
        return
    try:
        std = _latent_std(run, str(base) if own is None else None, key)
    except (CheckpointError, ValueError, RuntimeError) as error:
        yield problem(f"model.params.first_stage_config: {one_line(error)}")
        return
    scale = 1.0 if run.params.get("scale_by_std") else float(run.params.get("scale_factor", 1.0))
    measured = f"std {std * scale:.3g} over {counted(min(ENCODED, len(run.samples)), 'crop')}"
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
    """A discriminator that starts after the end of the run, or close to it."""
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
    """Averages that still hold the initial weights at the end of the run, snapshots that cannot be combined."""
    ema, steps = getattr(run.model, "model_ema", None), run.steps
    if not isinstance(ema, LitEma) or not steps:
        return
    for number, average in enumerate(ema.all_averages()):
        if isinstance(average, PowerEma):  # spans a share of any run
            continue
        decay, warm_up = float(average.decay), average.warm_up and int(average.num_updates) >= 0
        calls = range(1, min(steps, 200_000) + 1)
        left = math.prod(min(decay, (1 + n) / (10 + n)) if warm_up else decay for n in calls)
        if left > 0.1:
            fitting = max(0.0, 1 - round(10 / steps, 6))
            setting, advice = _ema_setting(run, number, decay, fitting)
            text = f"after {steps:,} steps {left:.0%} of the average are still the initial weights"
            yield problem(f"{setting}: {text}; {advice}")
    section: Mapping[str, Any] = run.params.get("ema_config") or {}
    interval, place = section.get("snapshot_every") or 0, "model.params.ema_config"
    if interval > steps:
        fitting = max(1, steps // (20 * ema.every)) * ema.every
        yield note(f"{place}.snapshot_every {interval}: the run of {steps:,} steps stores none; set it to {fitting}")
    if interval and len([each for each in ema.all_averages() if isinstance(each, PowerEma)]) == 1:
        text = "snapshots of one sigma_rel; two, such as 0.05 and 0.1, give averages of other widths"
        yield note(f"{place}.averages: {text} (docs/ema.md)")


def _ema_setting(run: Examined, number: int, decay: float, fitting: float) -> tuple[str, str]:
    """Return the key and value that give the decay of an average, and the advice to set another."""
    if run.params.get("ema_config") is not None:
        place = f"model.params.ema_config.averages[{number}].decay"
        return f"{place} {decay:g}", f"set it to {fitting:g}, or use {{sigma_rel: 0.1}}, which fits every run"
    if "ema_decay" in (constructor_arguments(str(run.plain["model"]["target"])) or ()):
        return f"model.params.ema_decay {decay:g}", f"set it to {fitting:g}, or model.params.use_ema=false"
    section = f"model.params.ema_config={{averages: [{{decay: {fitting:g}}}]}}"
    return "model.params.use_ema true", f"set {section}, or model.params.use_ema=false"


def check_learning_rate(run: Examined) -> Iterator[Finding]:
    """The scaled rate, and a schedule that does not fit into the run."""
    if run.rate is not None and run.settings.scale_lr and run.rate.value > SCALED_LR:
        base = float(run.plain["model"]["base_learning_rate"])
        text = f"multiplied by the effective batch it is {run.rate.value:.3g}"
        yield problem(f"model.base_learning_rate {base:g}: {text}; set lightning.scale_lr=false")
    factors, place = run.rate_factor, "model.params.scheduler_config.params"
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
    validates = False
    if "validation" in run.datasets:
        every = trainer.val_check_interval
        epochs = trainer.check_val_every_n_epoch or 1
        first = every if isinstance(every, int) else math.ceil(batches * (epochs - 1 + (every or 1.0)))
        validates = steps * run.accumulated >= first
        if not validates:
            fitting = max(1, min(batches, steps * run.accumulated // 4))
            text = f"the run ends at batch {steps * run.accumulated:,}, before the first validation at {first:,}"
            advice = f"set lightning.trainer.val_check_interval={fitting}"
            advice += " and lightning.trainer.check_val_every_n_epoch=1" if epochs > 1 else ""
            yield problem(f"lightning.trainer.val_check_interval {every}: {text}; {advice}")
    elif (monitor := str(getattr(run.model, "monitor", ""))).startswith("val"):
        yield note(f"data.params.validation: not set; {monitor} is not logged, so only last.ckpt is kept")
    callbacks: list[Any] = getattr(trainer, "callbacks", [])  # Lightning does not declare it
    for images in callbacks:
        idle = isinstance(images, ImageLogger) and not images.disabled and not any(map(images.is_due, range(steps)))
        if idle and not validates:  # a validation logs images too
            place = "lightning.callbacks.image_logger.params.batch_frequency"
            text = f"the run of {steps:,} steps ends before the first image log; set it to {max(1, steps // 4)}"
            yield note(f"{place} {images.batch_freq}: {text}")


def check_memory(run: Examined) -> Iterator[Finding]:
    """A batch that does not fit into the memory of the device."""
    rows, available = memory_rows(run), device_memory(run)
    total = sum(size for _, size in rows)
    if run.footprint is None or available is None or total <= available:
        return
    fixed = total - run.footprint.activations
    fitting = int((available - fixed) * run.batch_size / max(1, run.footprint.activations))
    text = f"data.params.batch_size {run.batch_size}: needs {size_text(total)}, the device has {size_text(available)}"
    if 1 <= fitting < run.batch_size:
        more = math.ceil(run.accumulated * run.batch_size / fitting)
        advice = f"set it to {fitting}, with lightning.trainer.accumulate_grad_batches={more} for the same step"
    else:
        advice = f"one sample needs {size_text(fixed + run.footprint.activations // run.batch_size)}"
        options = ["a larger device", "--precision bf16-mixed", "adapters (docs/lora.md)"]
        options += ["model.params.use_ema=false"] if getattr(run.model, "use_ema", False) else []
        advice += f"; choose {', '.join(options[:-1])} or {options[-1]}"
    yield problem(f"{text}; {advice}")


def check_workers(run: Examined) -> Iterator[Finding]:
    """More data workers than CPUs, and data that is read more slowly than the model trains."""
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
    text = f"a step does not reach {len(missing)} trainable parameters, the first is {missing[0]}"
    if run.ranks > 1 and run.strategy == "ddp" and run.model.automatic_optimization:
        yield problem(f"lightning.trainer.strategy ddp: {text}; set it to ddp_find_unused_parameters_true")
    else:
        yield note(text)


def check_disk(run: Examined) -> Iterator[Finding]:
    """Checkpoints that do not fit on the disk."""
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
        text = f"{newest + best} checkpoints of {size_text(file)} take {size_text(needed)}"
        text += f", and {folder} has {size_text(free)}"
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
