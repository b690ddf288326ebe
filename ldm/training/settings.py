"""Trainer settings, seed and learning rate of a run: flags over the YAML's `lightning` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.config.instantiate import ConfigError
from ldm.config.trainer_keys import DEVICE_KEYS, modernize
from ldm.training.flags import DEFAULT_SEED, RunOptions


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run; `lightning` is the section that the run directory keeps, in the user's words."""

    trainer: dict[str, Any]  # arguments of the installed Trainer, without the devices
    devices: dict[str, Any]  # the settings that choose devices
    devices_where: str  # "--" or "lightning.trainer.": where the devices were chosen
    seed: int
    scale_lr: bool
    start_from: str | None  # a checkpoint whose full state a new run starts from
    lightning: DictConfig

    @property
    def accumulation(self) -> int:
        return self.trainer.get("accumulate_grad_batches", 1)

    @property
    def num_nodes(self) -> int:
        return int(self.trainer.get("num_nodes", 1))


def resolve_settings(options: RunOptions, lightning: DictConfig) -> RunSettings:
    """Merge flags over the YAML's `lightning` section; raise ConfigError for an invalid or removed setting."""
    saved: Any = OmegaConf.to_container(lightning, resolve=True)
    from_yaml, from_flags = dict(saved.get("trainer") or {}), dict(options.trainer)
    devices_where, device_keys = "lightning.trainer.", (*DEVICE_KEYS, "distributed_backend")
    if any(name in from_flags for name in device_keys):
        # One place chooses the devices: a saved `gpus` must not contradict a new `--devices`.
        from_yaml = {name: value for name, value in from_yaml.items() if name not in device_keys}
        devices_where = "--"
    try:
        trainer = modernize(from_yaml) | modernize(from_flags, "--")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    start_from = trainer.pop("resume_from_checkpoint", None)
    if start_from and options.resume:
        raise ConfigError(
            "--resume continues in the old run directory, --resume_from_checkpoint starts a new run; give only one"
        )
    seed = _first(options.seed, saved.get("seed"), DEFAULT_SEED)
    scale_lr = _first(options.scale_lr, saved.get("scale_lr"), True)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"lightning.seed {seed!r}: expected a non-negative integer")
    if not isinstance(scale_lr, bool):
        raise ConfigError(f"lightning.scale_lr {scale_lr!r}: expected true or false")
    accumulation = trainer.get("accumulate_grad_batches", 1)
    if not isinstance(accumulation, int) or accumulation < 1:
        raise ConfigError(f"accumulate_grad_batches {accumulation!r}: expected an integer of at least 1")
    kept = {name: value for name, value in (from_yaml | from_flags).items() if name != "resume_from_checkpoint"}
    kept_lightning = OmegaConf.create({**lightning, "seed": seed, "scale_lr": scale_lr, "trainer": kept})
    devices = {name: trainer.pop(name) for name in DEVICE_KEYS if name in trainer}
    return RunSettings(trainer, devices, devices_where, seed, scale_lr, start_from, kept_lightning)


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


@dataclass(frozen=True)
class LearningRate:
    """A learning rate and the arithmetic behind it."""

    value: float
    rule: str


def learning_rate(config: DictConfig, settings: RunSettings, devices: int) -> LearningRate:
    """Return `accumulation * devices * batch_size * base_learning_rate`, or `base_learning_rate` without `--scale_lr`.

    Raises ConfigError if the base rate or the batch size is not a number.
    """
    base = OmegaConf.select(config, "model.base_learning_rate")
    if not isinstance(base, int | float) or isinstance(base, bool):
        example = "e.g. model.base_learning_rate=1.0e-4"
        raise ConfigError(f"model.base_learning_rate {base!r}: training needs a number here, {example}")
    batch_size = OmegaConf.select(config, "data.params.batch_size")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ConfigError(f"data.params.batch_size {batch_size!r}: expected an integer of at least 1")
    effective = settings.accumulation * devices * batch_size
    product = f"{batch_size} x {devices} device{'s' if devices > 1 else ''} x {settings.accumulation} accumulated"
    rule = f"effective batch {effective} = {product}; learning rate "
    if settings.scale_lr:
        rate = effective * base
        return LearningRate(rate, f"{rule}{rate:.3e} = {effective} x {base:.3e} (--scale_lr)")
    return LearningRate(float(base), f"{rule}{base:.3e}, not scaled (--scale_lr false)")
