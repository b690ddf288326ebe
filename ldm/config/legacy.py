"""Trainer settings in the words of Lightning 1.4, which published configs and command lines use, in the words of today."""

from __future__ import annotations

from typing import Any, NamedTuple


class Gone(NamedTuple):
    """A published Trainer setting without a meaning today: values that change nothing, and what to do instead of the others."""

    harmless: tuple[Any, ...]
    advice: str


# Strategies that the published `accelerator`, `distributed_backend` and `plugins` settings named.
STRATEGIES = ("ddp", "ddp_spawn", "ddp_notebook", "ddp_fork", "fsdp", "deepspeed")
_NO_STRATEGY_TODAY = {
    "dp": "one process for several GPUs is gone from Lightning; use --strategy ddp",
    "ddp2": "it is gone from Lightning; use --strategy ddp",
    "ddp_cpu": "use --accelerator cpu --devices N --strategy ddp",
    "horovod": "it is gone from Lightning; use --strategy ddp",
}
_OFF = (None, False, 0, "none")

GONE = {
    "amp_backend": Gone((None, "native"), "native mixed precision is the only kind now; leave it out"),
    "amp_level": Gone((None,), "apex is gone; use --precision 16-mixed or bf16-mixed"),
    "auto_lr_find": Gone(_OFF, "set model.base_learning_rate"),
    "auto_scale_batch_size": Gone(_OFF, "set data.params.batch_size"),
    "auto_select_gpus": Gone(_OFF, "name the devices: --gpus 0,1"),
    "flush_logs_every_n_steps": Gone(
        (None, 100), "logs are flushed whenever they are written; see --log_every_n_steps"
    ),
    "ipus": Gone(_OFF, "IPUs are gone from Lightning"),
    "log_gpu_memory": Gone(_OFF, "the CUDACallback reports peak memory every epoch"),
    "move_metrics_to_cpu": Gone(_OFF, "it is gone from Lightning"),
    "multiple_trainloader_mode": Gone((None, "max_size_cycle"), "there is one training loader"),
    "prepare_data_per_node": Gone((None, True), "it belongs to the data module now"),
    "process_position": Gone((None, 0), "there is one progress bar"),
    "reload_dataloaders_every_epoch": Gone(_OFF, "use --reload_dataloaders_every_n_epochs 1"),
    "stochastic_weight_avg": Gone(
        _OFF, "add lightning.callbacks.swa with target pytorch_lightning.callbacks.StochasticWeightAveraging"
    ),
    "terminate_on_nan": Gone((None, True), "a loss or gradient that is not finite always stops the run"),
    "tpu_cores": Gone(_OFF, "use --accelerator tpu --devices N"),
    "track_grad_norm": Gone((None, -1, "-1"), "it is gone from Lightning"),
    "truncated_bptt_steps": Gone(_OFF, "it is gone from Lightning"),
    "weights_save_path": Gone((None,), "checkpoints are in the run folder; move it with --logdir"),
}

# Published settings that `modernize` translates; they are flags beside those of today's signature.
TRANSLATED = {
    "gpus": "GPUs: indices where there is a comma (0,1 or 0,), a count otherwise (2; 0 is the CPU; -1 is all)",
    "num_processes": "number of CPU processes (today: --accelerator cpu --devices N)",
    "distributed_backend": "how several devices work together (today: --strategy)",
    "checkpoint_callback": "false saves no checkpoints (today: --enable_checkpointing)",
    "weights_summary": "top, full or none (today: --enable_model_summary)",
    "replace_sampler_ddp": "today: --use_distributed_sampler",
    "resume_from_checkpoint": "start a new run folder from this checkpoint's full state; see --resume to go on in the old one",
    "progress_bar_refresh_rate": "0 shows no progress bar",
}

DEVICE_SETTINGS = ("gpus", "num_processes", "accelerator", "devices")


def modernize(settings: dict[str, Any], where: str = "lightning.trainer.") -> dict[str, Any]:
    """Trainer settings of any age -> those of today's Trainer, `gpus` and `resume_from_checkpoint` left for the caller.

    `where` stands before a setting's name in messages ('--' for flags). Raises ValueError for one that has no meaning today.
    """
    out = dict(settings)
    for name in [name for name in out if name in GONE]:
        harmless, advice = GONE[name]
        value = out.pop(name)
        if value not in harmless:
            raise ValueError(f"{where}{name} {value}: {advice}")
    for name in ("distributed_backend", "accelerator"):
        backend = out.get(name)
        if backend in _NO_STRATEGY_TODAY:
            raise ValueError(f"{where}{name} {backend}: {_NO_STRATEGY_TODAY[backend]}")
        if backend in STRATEGIES or name == "distributed_backend":
            out.pop(name, None)
        if backend in STRATEGIES:
            out.setdefault("strategy", backend)
        elif name == "distributed_backend" and backend is not None:
            raise ValueError(f"{where}{name} {backend}: expected one of {', '.join(STRATEGIES)}")
    if (count := out.pop("num_processes", None)) not in (None, 1):
        if out.setdefault("accelerator", "cpu") != "cpu" or "gpus" in out or "devices" in out:
            raise ValueError(f"{where}num_processes {count}: it counts CPU processes; give devices in one way only")
        out["devices"] = count
    if out.get("precision") is not None:
        out["precision"] = _precision(out["precision"], where)
    _rename(out, "replace_sampler_ddp", "use_distributed_sampler")
    _rename(out, "checkpoint_callback", "enable_checkpointing")
    if "weights_summary" in out:
        out.setdefault("enable_model_summary", out.pop("weights_summary") not in (None, "none"))
    if "progress_bar_refresh_rate" in out and out.pop("progress_bar_refresh_rate") == 0:
        out.setdefault("enable_progress_bar", False)
    if out.get("max_steps", -1) is None:
        out["max_steps"] = -1
    return out


def _rename(settings: dict[str, Any], old: str, new: str) -> None:
    if old in settings:
        settings.setdefault(new, settings.pop(old))


PRECISIONS = (
    "32-true",
    "16-mixed",
    "bf16-mixed",
    "64-true",
    "16-true",
    "bf16-true",
    "transformer-engine",
    "transformer-engine-float16",
)
_SHORT = {
    "16": "16-mixed",
    "bf16": "bf16-mixed",
    "32": "32-true",
    "64": "64-true",
    "fp16": "16-mixed",
    "fp32": "32-true",
}


def _precision(value: Any, where: str) -> str:
    precision = _SHORT.get(str(value), str(value))
    if precision not in PRECISIONS:
        raise ValueError(f"{where}precision {value}: expected one of {', '.join((*_SHORT, *PRECISIONS))}")
    return precision
