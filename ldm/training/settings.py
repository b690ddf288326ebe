"""Trainer settings, seed and learning rate of a run: flags over the YAML's `lightning` section, in today's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.config.instantiate import ConfigError
from ldm.config.trainer_keys import DEVICE_KEYS, modernize
from ldm.training.devices import Devices, Machine, choose
from ldm.training.flags import DEFAULT_SEED, Options

MANUAL = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")


@dataclass(frozen=True)
class Settings:
    """What a run is started with; `lightning` is the section that the run folder keeps, in the user's words."""

    trainer: dict[str, Any]  # arguments of today's Trainer, without the devices
    devices_where: str  # "--" or "lightning.trainer.": where the devices were chosen
    device_settings: dict[str, Any]
    seed: int
    scale_lr: bool
    start_from: str | None  # a checkpoint whose full state a new run starts from
    lightning: DictConfig

    @property
    def accumulation(self) -> int:
        return int(self.trainer.get("accumulate_grad_batches") or 1)

    def devices(self, machine: Machine) -> Devices:
        return choose(self.device_settings, machine, self.devices_where)


def settle(options: Options, lightning: DictConfig) -> Settings:
    """Settings from the command line's flags over the YAML's; only what was given is passed on to the Trainer.

    Raises ConfigError for a setting that means nothing today.
    """
    saved = OmegaConf.to_container(lightning, resolve=True)
    from_yaml, from_flags = dict(saved.get("trainer") or {}), dict(options.trainer)
    devices_where = "lightning.trainer."
    if any(name in from_flags for name in (*DEVICE_KEYS, "distributed_backend")):
        # One place decides on devices, or a saved `gpus` would fight with a new `--devices`.
        from_yaml = {
            name: value for name, value in from_yaml.items() if name not in (*DEVICE_KEYS, "distributed_backend")
        }
        devices_where = "--"
    try:
        trainer = modernize(from_yaml) | modernize(from_flags, "--")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    start_from = trainer.pop("resume_from_checkpoint", None)
    if start_from and options.resume:
        raise ConfigError(
            "--resume and --resume_from_checkpoint: one goes on in the old run folder, the other starts a new run; give one"
        )
    from_yaml.pop("resume_from_checkpoint", None)
    seed = _first(options.seed, saved.get("seed"), DEFAULT_SEED)
    scale_lr = _first(options.scale_lr, saved.get("scale_lr"), True)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"lightning.seed {seed!r}: expected an integer of at least 0")
    if not isinstance(scale_lr, bool):
        raise ConfigError(f"lightning.scale_lr {scale_lr!r}: expected true or false")
    _check_counts(trainer)
    kept = {name: value for name, value in from_flags.items() if name != "resume_from_checkpoint"}
    kept_lightning = OmegaConf.merge(lightning, {"seed": seed, "scale_lr": scale_lr})
    kept_lightning["trainer"] = {**from_yaml, **kept}
    device_settings = {name: trainer.pop(name) for name in DEVICE_KEYS if name in trainer}
    return Settings(trainer, devices_where, device_settings, seed, scale_lr, start_from, kept_lightning)


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _check_counts(trainer: dict[str, Any]) -> None:
    accumulation = trainer.get("accumulate_grad_batches", 1)
    if accumulation is None or not isinstance(accumulation, int) or accumulation < 1:
        raise ConfigError(f"accumulate_grad_batches {accumulation!r}: expected an integer of at least 1")


@dataclass(frozen=True)
class LearningRate:
    """A learning rate and the arithmetic that it comes from."""

    value: float
    rule: str


def learning_rate(config: DictConfig, settings: Settings, devices: int) -> LearningRate:
    """`accumulation * devices * batch_size * base_learning_rate`, or `base_learning_rate` alone without `--scale_lr`.

    Raises ConfigError where the configs give no number for the base rate or the batch size.
    """
    base = OmegaConf.select(config, "model.base_learning_rate")
    if not isinstance(base, int | float) or isinstance(base, bool):
        raise ConfigError(
            f"model.base_learning_rate {base!r}: training needs a number here, e.g. model.base_learning_rate=1.0e-4"
        )
    batch_size = OmegaConf.select(config, "data.params.batch_size")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ConfigError(f"data.params.batch_size {batch_size!r}: expected an integer of at least 1")
    accumulation = settings.accumulation
    effective = accumulation * devices * batch_size
    parts = f"effective batch {effective} = {batch_size} x {devices} device{'s' if devices > 1 else ''} x {accumulation} accumulated"
    if settings.scale_lr:
        return LearningRate(
            effective * base, f"{parts}; learning rate {effective * base:.3e} = {effective} x {base:.3e} (--scale_lr)"
        )
    return LearningRate(float(base), f"{parts}; learning rate {base:.3e}, not scaled by it (--scale_lr false)")
