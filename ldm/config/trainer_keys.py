"""Keys of `lightning.trainer`, which are also flags: those of the installed Trainer and those of Lightning 1.4."""

from __future__ import annotations

from typing import Any, NamedTuple

from ldm.config.instantiate import ConfigError
from ldm.config.signature import constructor_arguments

TRAINER = "pytorch_lightning.trainer.trainer.Trainer"

# Trainer arguments that cannot be set: they are objects, or follow from the run directory.
UNSUPPORTED = {
    "callbacks": "set callbacks in the YAML under lightning.callbacks",
    "plugins": "not supported; see --precision and --strategy",
    "default_root_dir": "outputs go to the run directory; move it with --logdir",
    "model_registry": "Lightning's model hub is not supported",
}
COMPILERS = ("inductor", "aot_eager", "eager")  # backends of torch.compile, fastest first
DEVICE_KEYS = ("gpus", "num_processes", "accelerator", "devices")


class RemovedSetting(NamedTuple):
    """A setting of Lightning 1.4 that no longer exists."""

    ignored: tuple[Any, ...]  # values that ask for nothing
    advice: str  # for any other value


_OFF = (None, False, 0, "none")
REMOVED_SETTINGS = {
    "amp_backend": RemovedSetting((None, "native"), "only native mixed precision is supported; remove it"),
    "amp_level": RemovedSetting((None,), "apex is not supported; use --precision 16-mixed or bf16-mixed"),
    "auto_lr_find": RemovedSetting(_OFF, "set model.base_learning_rate"),
    "auto_scale_batch_size": RemovedSetting(_OFF, "set data.params.batch_size"),
    "auto_select_gpus": RemovedSetting(_OFF, "choose the devices: --gpus 0,1"),
    "flush_logs_every_n_steps": RemovedSetting((None, 100), "logs are flushed when written; see --log_every_n_steps"),
    "ipus": RemovedSetting(_OFF, "Lightning no longer supports IPUs"),
    "log_gpu_memory": RemovedSetting(_OFF, "CUDACallback reports peak memory every epoch"),
    "move_metrics_to_cpu": RemovedSetting(_OFF, "Lightning removed it"),
    "multiple_trainloader_mode": RemovedSetting((None, "max_size_cycle"), "there is only one training loader"),
    "prepare_data_per_node": RemovedSetting((None, True), "it is an attribute of the data module now"),
    "process_position": RemovedSetting((None, 0), "there is only one progress bar"),
    "reload_dataloaders_every_epoch": RemovedSetting(_OFF, "use --reload_dataloaders_every_n_epochs 1"),
    "stochastic_weight_avg": RemovedSetting(
        _OFF, "add lightning.callbacks.swa with target pytorch_lightning.callbacks.StochasticWeightAveraging"
    ),
    "terminate_on_nan": RemovedSetting((None, True), "a non-finite loss or gradient always stops the run"),
    "tpu_cores": RemovedSetting(_OFF, "use --accelerator tpu --devices N"),
    "track_grad_norm": RemovedSetting((None, -1, "-1"), "Lightning removed it"),
    "truncated_bptt_steps": RemovedSetting(_OFF, "Lightning removed it"),
    "weights_save_path": RemovedSetting((None,), "checkpoints are in the run directory; move it with --logdir"),
}

# Settings of Lightning 1.4 that `modernize` translates, with their --help texts.
TRANSLATED = {
    "gpus": "GPU indices if there is a comma (0,1 or 0,), else a count (2; 0 is the CPU; -1 is all)",
    "num_processes": "number of CPU processes (now: --accelerator cpu --devices N)",
    "distributed_backend": "distributed strategy (now: --strategy)",
    "checkpoint_callback": "false saves no checkpoints (now: --enable_checkpointing)",
    "weights_summary": "top, full or none (now: --enable_model_summary)",
    "replace_sampler_ddp": "now: --use_distributed_sampler",
    "resume_from_checkpoint": "start a new run from this checkpoint's full state (see also --resume)",
    "progress_bar_refresh_rate": "0 hides the progress bar",
}

_RENAMED = {"replace_sampler_ddp": "use_distributed_sampler", "checkpoint_callback": "enable_checkpointing"}

# Strategies that `accelerator` and `distributed_backend` named in Lightning 1.4.
STRATEGIES = ("ddp", "ddp_spawn", "ddp_notebook", "ddp_fork", "fsdp", "deepspeed")
_REMOVED_STRATEGIES = {
    "dp": "Lightning removed it; use --strategy ddp",
    "ddp2": "Lightning removed it; use --strategy ddp",
    "ddp_cpu": "use --accelerator cpu --devices N --strategy ddp",
    "horovod": "Lightning removed it; use --strategy ddp",
}

_TRANSFORMER_ENGINE = ("transformer-engine", "transformer-engine-float16")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "64-true", "16-true", "bf16-true", *_TRANSFORMER_ENGINE)
_SHORT_PRECISIONS = {
    "16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true", "fp16": "16-mixed", "fp32": "32-true",
}  # fmt: skip

_LIMIT = "NonNegativeInt | Probability | None"
_SPECIAL = "Annotated[int, '>= -1']"  # -1 stands for "no limit"
# Types of Trainer settings as annotations, ranges included, for those that the Trainer's own annotations leave open.
TRAINER_TYPES = {
    "num_nodes": "PositiveInt",
    "fast_dev_run": "bool | NonNegativeInt",
    "max_epochs": f"{_SPECIAL} | None",
    "min_epochs": "NonNegativeInt | None",
    "max_steps": f"{_SPECIAL} | None",
    "min_steps": "NonNegativeInt | None",
    "limit_train_batches": _LIMIT,
    "limit_val_batches": _LIMIT,
    "limit_test_batches": _LIMIT,
    "limit_predict_batches": _LIMIT,
    "overfit_batches": _LIMIT,
    "val_check_interval": "PositiveInt | Annotated[float, '(0, 1]'] | None",
    "check_val_every_n_epoch": "PositiveInt | None",
    "num_sanity_val_steps": f"{_SPECIAL} | None",
    "log_every_n_steps": "NonNegativeInt | None",
    "accumulate_grad_batches": "PositiveInt",
    "gradient_clip_val": "NonNegativeFloat | None",
    "gradient_clip_algorithm": "Literal['norm', 'value'] | None",
    "reload_dataloaders_every_n_epochs": "NonNegativeInt",
    "resume_from_checkpoint": "Path | None",
    "max_time": "Duration | None",
    "logger": "bool | None",
    "deterministic": "bool | Literal['warn'] | None",
    "profiler": "Literal['simple', 'advanced', 'pytorch', 'xla'] | None",
    "checkpoint_callback": "bool | None",
    "weights_summary": "Literal['top', 'full', 'none'] | None",
    "replace_sampler_ddp": "bool",
    "progress_bar_refresh_rate": "NonNegativeInt | None",
    "num_processes": "PositiveInt | None",
    # chosen together, and checked with the devices
    "devices": "",
    "strategy": "",
}

LOGGER_TYPES = {"flush_logs_every_n_steps": "PositiveInt"}  # arguments of Lightning's loggers


def trainer_types() -> dict[str, str]:
    """Return the annotation of each setting of the installed Trainer, with the ranges of TRAINER_TYPES."""
    return {**(constructor_arguments(TRAINER) or {}), **TRAINER_TYPES}


def trainer_keys() -> set[str]:
    """Return the keys that are valid under `lightning.trainer` and as flags, those of Lightning 1.4 included."""
    keys = set(constructor_arguments(TRAINER) or ()) - set(UNSUPPORTED)
    return keys | set(TRANSLATED) | set(REMOVED_SETTINGS)


def modernize(settings: dict[str, Any], where: str = "lightning.trainer.") -> dict[str, Any]:
    """Translate Trainer settings of Lightning 1.4 to the installed version's; `gpus` and `resume_from_checkpoint` stay.

    where: prefix of a setting's name in messages ('--' for flags). Raises ConfigError for a setting without equivalent.
    """
    for name, value in settings.items():
        if name in REMOVED_SETTINGS and value not in REMOVED_SETTINGS[name].ignored:
            raise ConfigError(f"{where}{name} {value}: {REMOVED_SETTINGS[name].advice}")
    out = {name: value for name, value in settings.items() if name not in REMOVED_SETTINGS}
    _choose_strategy(out, where)
    if (value := out.get("precision")) is not None:
        out["precision"] = _SHORT_PRECISIONS.get(str(value), str(value))
        if out["precision"] not in PRECISIONS:
            choices = ", ".join((*_SHORT_PRECISIONS, *PRECISIONS))
            raise ConfigError(f"{where}precision {value}: expected one of {choices}")
    for old, new in _RENAMED.items():
        if old in out:
            out.setdefault(new, out.pop(old))
    if "weights_summary" in out:
        out.setdefault("enable_model_summary", out.pop("weights_summary") not in (None, "none"))
    if out.pop("progress_bar_refresh_rate", None) == 0:
        out.setdefault("enable_progress_bar", False)
    if out.get("max_steps", -1) is None:
        out["max_steps"] = -1
    return out


def _choose_strategy(out: dict[str, Any], where: str) -> None:
    """Turn `distributed_backend`, a strategy as `accelerator` and `num_processes` into the settings of today."""
    for name in ("distributed_backend", "accelerator"):
        backend = out.get(name)
        if backend in _REMOVED_STRATEGIES:
            raise ConfigError(f"{where}{name} {backend}: {_REMOVED_STRATEGIES[backend]}")
        if backend in STRATEGIES:
            out.setdefault("strategy", out.pop(name))
        elif name == "distributed_backend" and out.pop(name, None) is not None:
            raise ConfigError(f"{where}{name} {backend}: expected one of {', '.join(STRATEGIES)}")
    if (count := out.pop("num_processes", None)) not in (None, 1):
        if out.setdefault("accelerator", "cpu") != "cpu" or "gpus" in out or "devices" in out:
            raise ConfigError(
                f"{where}num_processes {count}: it counts CPU processes; choose the devices by one setting only"
            )
        out["devices"] = count
