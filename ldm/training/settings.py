"""Trainer settings, seed and learning rate of a run: flags over the YAML's `lightning` section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from ldm.config.instantiate import ConfigError, convert_params
from ldm.config.trainer_keys import DEVICE_KEYS, modernize, trainer_types
from ldm.paths import expand_user
from ldm.training.flags import DEFAULT_SEED, RunOptions


def resolve_seed(flag: int | None, lightning: Mapping[str, Any]) -> int:
    """Return the seed of a flag, else of the section `lightning`, else DEFAULT_SEED. Raises ConfigError."""
    seed = next(value for value in (flag, lightning.get("seed"), DEFAULT_SEED) if value is not None)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 32:  # NumPy's limit
        place = "lightning.seed" if flag is None else "--seed"
        raise ConfigError(f"{place} {seed!r}: expected an integer from 0 to 4294967295")
    return seed


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run; `lightning` is the section as the run directory keeps it, in the user's words."""

    trainer: dict[str, Any]  # arguments of the installed Trainer, without the devices
    devices: dict[str, Any]  # the settings that choose devices
    devices_where: str  # prefix of these settings in messages: "--" or "lightning.trainer."
    seed: int
    scale_lr: bool
    start_from: str | None  # a checkpoint whose full state a run without checkpoints starts from
    lightning: DictConfig
    compile: str | None = None  # backend of torch.compile

    @property
    def num_nodes(self) -> int:
        return int(self.trainer.get("num_nodes", 1))


def resolve_settings(options: RunOptions, lightning: DictConfig) -> RunSettings:
    """Merge flags over the YAML's `lightning` section; raise ConfigError for an invalid or removed setting."""
    saved: Any = OmegaConf.to_container(lightning, resolve=True)
    from_yaml, from_flags = saved.get("trainer") or {}, options.trainer
    devices_where, device_keys = "lightning.trainer.", {*DEVICE_KEYS, "distributed_backend"}
    if device_keys & set(from_flags):
        # The devices are chosen in one place: a saved `gpus` must not contradict a new `--devices`.
        from_yaml = {name: value for name, value in from_yaml.items() if name not in device_keys}
        devices_where = "--"
    from_flags = convert_params(from_flags, trainer_types(), "--")
    trainer = modernize(from_yaml) | modernize(from_flags, "--")
    start_from = trainer.pop("resume_from_checkpoint", None)
    if start_from and options.resume and "resume_from_checkpoint" in from_flags:
        raise ConfigError(
            "--resume continues in the old run directory, --resume_from_checkpoint starts a new run; give only one"
        )
    seed = resolve_seed(options.seed, saved)
    scale_lr = next(value for value in (options.scale_lr, saved.get("scale_lr"), True) if value is not None)
    if not isinstance(scale_lr, bool):
        raise ConfigError(f"lightning.scale_lr {scale_lr!r}: expected true or false")
    kept = from_yaml | from_flags
    if start_from:  # for a restart before the first checkpoint
        kept["resume_from_checkpoint"] = str(expand_user(start_from).absolute())
    compiler = options.compile or saved.get("compile")
    kept_lightning = OmegaConf.create({**lightning, "seed": seed, "scale_lr": scale_lr, "trainer": kept})
    if compiler:
        kept_lightning["compile"] = compiler
    devices = {name: trainer.pop(name) for name in DEVICE_KEYS if name in trainer}
    return RunSettings(trainer, devices, devices_where, seed, scale_lr, start_from, kept_lightning, compiler)


def check_batches(trainer: Mapping[str, Any], batches: Mapping[str, int]) -> None:
    """Raise ConfigError for limits and validation intervals that an epoch's batches of train, validation or test lack.

    trainer: arguments of the Trainer. batches: their number by split.
    """
    if trainer.get("fast_dev_run"):
        return
    left = {}
    for split, short in (("train", "train"), ("validation", "val"), ("test", "test")):
        name, count = f"limit_{short}_batches", batches.get(split, 0)
        limit = trainer.get("overfit_batches") or trainer.get(name)
        if trainer.get("overfit_batches"):
            name = "overfit_batches"
        left[split] = count
        if isinstance(limit, float):
            left[split] = int(count * limit)
            if count and limit and not left[split]:
                text = (
                    f"no batch of {count} in data.params.{split}; set at least {1 / count:.2g}, or a number of batches"
                )
                raise ConfigError(f"lightning.trainer.{name} {limit:g}: {text}")
        elif limit is not None:
            left[split] = min(count, limit)
    every = trainer.get("val_check_interval")
    within_epoch = trainer.get("check_val_every_n_epoch", 1) is not None
    if isinstance(every, int) and within_epoch and 0 < left["train"] < every and left["validation"]:
        choices = f"expected 1 to {left['train']}, the training batches of an epoch, or a share in (0, 1]"
        advice = "lightning.trainer.check_val_every_n_epoch=null counts batches over epochs"
        raise ConfigError(f"lightning.trainer.val_check_interval {every}: {choices}; {advice}")


class LearningRate(NamedTuple):
    """A learning rate, and the arithmetic behind it for the log."""

    value: float
    rule: str


def learning_rate(config: DictConfig, settings: RunSettings, devices: int) -> LearningRate:
    """Return `accumulation * devices * batch_size * base_learning_rate`, or `base_learning_rate` without `--scale_lr`.

    Raises ConfigError if one of these is not a number.
    """
    base = OmegaConf.select(config, "model.base_learning_rate")
    if not isinstance(base, int | float) or isinstance(base, bool):
        example = "e.g. model.base_learning_rate=1.0e-4"
        raise ConfigError(f"model.base_learning_rate {base!r}: training needs a number here, {example}")
    batch_size = _count("data.params.batch_size", OmegaConf.select(config, "data.params.batch_size"))
    accumulation = _count("accumulate_grad_batches", settings.trainer.get("accumulate_grad_batches", 1))
    effective = accumulation * devices * batch_size
    product = f"{batch_size} x {devices} device{'s' if devices > 1 else ''} x {accumulation} accumulated"
    rule = f"effective batch {effective} = {product}; learning rate "
    if settings.scale_lr:
        rate = effective * base
        return LearningRate(rate, f"{rule}{rate:.3e} = {effective} x {base:.3e} (--scale_lr)")
    return LearningRate(float(base), f"{rule}{base:.3e}, not scaled (--scale_lr false)")


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} {value!r}: expected an integer of at least 1")
    return value
