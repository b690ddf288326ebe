"""The part of a run that needs torch: build data, model and Trainer, then train and test."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.distributed.rendezvous import rendezvous

from ldm.callbacks import SignalCallback, StepSeed
from ldm.checkpoint import verify_checkpoint
from ldm.checkpoint.load import advise_settings
from ldm.checkpoint.resume import find_checkpoint
from ldm.cli import EXIT_INTERRUPTED, Stopped, counted, one_line
from ldm.config.files import load_yaml
from ldm.config.instantiate import ConfigError, instantiate_from_config, value_at
from ldm.config.merge import find_config
from ldm.config.model_info import model_info
from ldm.config.validate import check_class_count
from ldm.data.captions import usual_table
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.latents import use_cached_stages
from ldm.data.shards import allow_pipes
from ldm.inference.requests import script_for
from ldm.machine.allocator import keep_freed_memory
from ldm.models.diffusion.compile import check_compiler
from ldm.paths import expand_user, shown_path
from ldm.training.class_images import generate_class_images
from ldm.training.devices import Machine, choose_devices
from ldm.training.flags import RunOptions
from ldm.training.launch import check_nodes
from ldm.training.report import TrainingFailed, is_main_process
from ldm.training.run_directory import RunDirectory
from ldm.training.settings import RunSettings, check_batches, learning_rate
from ldm.training.trainer import build_trainer, check_trainer

logger = logging.getLogger(__name__)


def execute(options: RunOptions, directory: RunDirectory, config: DictConfig, settings: RunSettings) -> int:
    """Build data, model and Trainer, train if `options.train`, evaluate the test set if any; return the exit code."""
    directory = replace(directory, checkpoint=_checkpoint(directory, settings))
    check_nodes(settings.num_nodes)
    devices = choose_devices(settings.devices, this_machine(), settings.devices_where)
    if devices.accelerator == "cpu":
        keep_freed_memory()
    rate = learning_rate(config, settings, devices.processes * settings.num_nodes) if options.train else None
    quiet_lightning(options.debug)
    check_trainer(settings, devices)
    if options.train:
        generate_class_images(config, settings.seed, devices.first)
    pl.seed_everything(settings.seed, verbose=False)
    if options.allow_pipe:
        allow_pipes()
    data = build_data(config, settings, options.strict_data)
    check_batches(settings.trainer, batches_of(data, devices.processes * settings.num_nodes))
    check_class_count(config, getattr(data, "datasets", {}))
    model = instantiate_from_config(use_cached_stages(config))
    if rate is not None:
        model.learning_rate = rate.value
    if options.train and settings.compile is not None:
        compile_network(model, settings.compile, devices.accelerator)
    trainer = build_trainer(config, settings, devices, directory, model, rate)
    logger.info("%-11s %s, %s", "device", devices.text, _precision_text(trainer, devices.accelerator))
    logger.info("%-11s %s", "directory", directory.path)
    code = fit(trainer, model, data, directory) if options.train else 0
    saved = options.train and code == 0 and (directory.checkpoints / "last.ckpt").is_file()
    saved_adapters = saved and getattr(model, "trains_adapters", False)
    adapters = sorted(map(str, directory.checkpoints.glob("*.safetensors"))) if saved_adapters else []
    if adapters:
        logger.info("%-11s %s", "adapter", ", ".join(adapters))
    if saved and (command := next_command(config, directory.path, options.base)):
        logger.info("%-11s %s", "next", command)
    if code == 0 and not options.no_test:
        untrained = not options.train and directory.checkpoint is not None
        test(trainer, model, data, config, str(directory.checkpoint) if untrained else None)
    return code


def quiet_lightning(debug: bool) -> None:
    """Hide Lightning's INFO lines, which repeat ours, unless `debug`; its import enabled them."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.INFO if debug else logging.WARNING)
    if not debug:
        # They warn about kernels that training does not use, and about a class of torchao.
        for name in ("bitsandbytes", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)


def this_machine() -> Machine:
    """Return the GPUs of this machine."""
    if torch.backends.mps.is_available():
        return Machine(1, "mps")
    return Machine(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def compile_network(model: pl.LightningModule, backend: str, accelerator: str) -> None:
    """Compile the denoising network of a model. Raises ConfigError if this is not possible."""
    compile_model = getattr(model, "compile_network", None)
    if compile_model is None:
        raise ConfigError(f"--compile: {type(model).__name__} has no method compile_network; leave it out")
    check_compiler(backend, accelerator)
    compile_model(backend)


def fit(trainer: pl.Trainer, model: pl.LightningModule, data: Any, directory: RunDirectory) -> int:
    """Train and return 0, or the exit code of the signal that stopped training.

    Raises TrainingFailed for an exception after the first batch began.
    """
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks", [])  # Lightning does not declare it
    signals = next(each for each in callbacks if isinstance(each, SignalCallback))
    steps = next(each for each in callbacks if isinstance(each, StepSeed))
    checkpoint = None if directory.checkpoint is None else str(directory.checkpoint)
    try:
        _separate_restart(trainer)
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    except Stopped as stop:
        resumable = stop.checkpoint or any(directory.configs.glob("*.yaml"))
        how = f"continue with --resume {directory.path}" if resumable else "nothing was saved"
        logger.info("%-11s by %s at step %d; %s", "stopped", stop.reason, trainer.global_step, how)
        return stop.exit_code
    except SystemExit:  # Lightning turns a KeyboardInterrupt into it
        return EXIT_INTERRUPTED
    except ConfigError:
        raise
    except MisconfigurationException as error:
        raise ConfigError(one_line(error)) from error
    except Exception as error:
        if isinstance(error, KeyError) and checkpoint and "checkpoint contains only the model" in str(error):
            raise ConfigError(
                f"{checkpoint} holds only weights, without the optimizer state that resuming needs; "
                f"start a new run from it with model.params.ckpt_path={checkpoint}"
            ) from error
        if checkpoint and not steps.began and "loading state_dict" in str(error):
            raise ConfigError(f"{checkpoint} does not fit the model: {_misfits(str(error))}") from error
        if checkpoint and not steps.began and "loaded state dict" in str(error):  # of the optimizer
            raise ConfigError(
                f"{checkpoint} does not fit: it was saved with other trained parameters; {_UNDO}"
            ) from error
        if steps.began or not isinstance(error, ValueError | OSError):
            raise TrainingFailed from error
        raise
    finally:
        signals.restore()
    if not steps.began and trainer.limit_train_batches == 0:
        logger.warning("%-11s no steps: lightning.trainer.limit_train_batches is 0", "trained")
    elif not steps.began:
        at = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        limits = f"max_epochs {trainer.max_epochs}, max_steps {trainer.max_steps}"
        logger.warning("%-11s no steps: the run is already at %s (%s)", "trained", at, limits)
    return 0


def next_command(config: DictConfig, run: Path, base: Sequence[str] = ()) -> str:
    """Return the command that samples from a trained model, or that trains a diffusion model on a first stage.

    base: the YAMLs of the run; the second command takes those that hold data alone.
    """
    target, place = str(config.model.target), shlex.quote(str(shown_path(run)))
    params = config.model.get("params") or {}
    if "ddconfig" in params:
        stage = f"model.params.first_stage_config.params.ckpt_path={place}/checkpoints/last.ckpt"
        root = OmegaConf.select(config, "data.params.train.params.root")
        data = f" data.params.train.params.root={shlex.quote(str(root))}" if root else ""
        if root and (table := usual_table(expand_user(root))):
            data += f" data.params.train.params.captions={table}"
        more = [path for path in base if {"data"} == load_yaml(find_config(path)).keys()]
        second, changed = _second_stage(config, base, bool(more))
        words = shlex.join([second, *more])
        return f"python main.py --base {words} -t {stage}{changed}{data}" if second else ""
    if "unet_config" not in params or "Classifier" in target:
        return ""
    content: Any = OmegaConf.to_container(config, resolve=True)
    script = script_for(model_info(content)).split()[0]
    prompt = _prompt(config)
    detector = OmegaConf.select(config, "data.params.train.params.detector") or "none"
    flags = {
        "scripts/txt2img.py": f"--ckpt {place} --prompt {prompt}",
        "scripts/edit.py": f'--ckpt {place} --init-img photo.png --prompt "..."',
        "scripts/control2img.py": f'--ckpt {place} --control-image image.png --detector {detector} --prompt "..."',
        "scripts/inpaint.py": f"--ckpt {place} --init-img photo.png --mask mask.png --outdir results",
        "scripts/upscale.py": f"--ckpt {place} --init-img small.png",
        "scripts/sample_diffusion.py": f"-r {place} -n 16",
        "scripts/sample_conditional.py": f"-r {place}",
    }
    return f"python {script} {flags[script]}" if script in flags else ""


def _second_stage(config: DictConfig, base: Sequence[str], own_data: bool) -> tuple[str, str]:
    """Return a config of a diffusion model that fits a trained first stage and its data, and its overrides; "" if none.

    A recipe of text to image, or a YAML beside those of `base`, with latents of the same shape and, unless the data are
    in YAMLs of `base` (`own_data`), the same dataset class. Other differences of `ddconfig` become overrides.
    """
    recipes = [Path("configs", "recipes", f"text-to-image{size}-folder.yaml") for size in ("-small", "")]
    beside = {shown_path(file) for path in base for file in find_config(path).parent.glob("*.yaml")}
    own, stage = config.model, "first_stage_config"
    for path in [*recipes, *sorted(beside)]:
        try:
            other = load_yaml(find_config(path))
        except (ConfigError, OSError):
            continue  # a YAML beside those of the run, which did not need it
        model, first = value_at(other, "model", "params") or {}, value_at(other, "model", "params", stage)
        dataset, target = value_at(other, "data", "params", "train", "target"), value_at(first, "target")
        there, here = (dict(value_at(each, "params", "ddconfig") or {}) for each in (first, own))
        same_data = own_data or dataset == value_at(config, "data", "params", "train", "target")
        same_class = target == own.target and "ckpt_path" not in model  # of a model to fine-tune
        fits = "ch_mult" in there.keys() <= here.keys() and _latent(first, there) == _latent(own, here)
        if same_data and same_class and fits:
            place = f"model.params.{stage}.params.ddconfig"
            changed = [f"{place}.{key}={value}" for key, value in here.items() if there.get(key) != value]
            return str(path), "".join(f" {shlex.quote(each)}" for each in changed)
    return "", ""


def _latent(stage: Any, ddconfig: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the settings of a first stage that a diffusion model repeats elsewhere than in its `ddconfig`."""
    names = ("resolution", "z_channels", "double_z", "in_channels", "out_ch")
    return value_at(stage, "params", "embed_dim"), len(ddconfig["ch_mult"]), *map(ddconfig.get, names)


def _prompt(config: DictConfig) -> str:
    """Return a prompt, quoted, with the words that a run teaches: tokens of textual inversion, DreamBooth's subject."""
    section = OmegaConf.select(config, "model.params.token_embeddings") or []
    tokens = [each["token"] for each in ([section] if isinstance(section, Mapping) else section)]
    subject = OmegaConf.select(config, "data.params.train.params.instance.params.subject")
    return shlex.quote(" ".join(["...", *tokens]) if tokens else str(subject)) if tokens or subject else '"..."'


_UNDO = "undo the change of model.params (see the lines 'changed')"


def _misfits(message: str) -> str:
    """Return the first three keys of PyTorch's message about a state dict, and how many there are."""
    shapes = re.findall(r"size mismatch for (\S+): .*?torch.Size\((.*?)\).*?torch.Size\((.*?)\)", message)
    keys = [f"{name} is {before} in the file and {now} in the model" for name, before, now in shapes]
    for kind in ("Missing", "Unexpected"):
        named = re.search(rf"{kind} key\(s\) in state_dict: (.*?)\. *(?:\n|$)", message)
        keys += [f"{kind.lower()}: {name}" for name in re.findall(r'"(.*?)"', named[1] if named else "")]
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    numbers = {name: [[int(n) for n in re.findall(r"\d+", shape)] for shape in both] for name, *both in shapes}
    advice = advise_settings({name: (before, now) for name, (before, now) in numbers.items()})
    advice = f"{advice}; " if advice else ""
    return f"{'; '.join(keys[:3])}{more}; {advice}{_UNDO}"


def _separate_restart(trainer: pl.Trainer) -> None:
    """Give the ranks of a restart by torchrun their own keys in the agent's store.

    It still holds the addresses of the processes that died; a rank that is early would try to connect to them.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    strategy = trainer.strategy
    if count == "0" or not isinstance(strategy, DDPStrategy) or torch.distributed.is_initialized():
        return
    backend = "nccl" if strategy.root_device.type == "cuda" else "gloo"
    store, rank, world_size = next(rendezvous("env://"))
    store = torch.distributed.PrefixStore(f"restart-{count}", store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def test(trainer: pl.Trainer, model: pl.LightningModule, data: Any, config: DictConfig, checkpoint: str | None) -> None:
    """Evaluate the test set if the config has one, with the weights of `checkpoint` or else those of `model`."""
    if not (config.data.get("params") or {}).get("test"):
        return
    if is_overridden("test_step", model):
        for metrics in trainer.test(model, data, verbose=False, ckpt_path=checkpoint, weights_only=True):
            logger.info("%-11s %s", "test", ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    elif trainer.state.fn != "fit":
        raise ConfigError(f"data.params.test: {type(model).__name__} has no test_step")
    else:
        logger.info("%-11s skipped: %s has no test_step", "test", type(model).__name__)


def _checkpoint(directory: RunDirectory, settings: RunSettings) -> Path | None:
    """Return the checkpoint that training starts from, after checking that it is complete.

    If `last.ckpt` of a resumed run is damaged or missing: the newest complete checkpoint (the log names both); None if
    the run has not written any yet: it is then repeated from its start, which the seed makes exact.
    Raises CheckpointError for any other damaged or missing file.
    """
    path = directory.checkpoint or settings.start_from
    if directory.resumed and (directory.checkpoint is None or directory.checkpoint.name == "last.ckpt"):
        if directory.has_checkpoints:
            return find_checkpoint(directory.path, full_state=True)
        where = f"from {path}" if path else "at step 0"
        logger.warning("%-11s no checkpoint yet: the run starts again %s, with its saved configs", "resumed", where)
    if not path:
        return None
    file = expand_user(path).resolve()
    verify_checkpoint(file)
    return file


def build_data(config: DictConfig, settings: RunSettings, strict: bool, prepare: bool = True) -> Any:
    """Build the data module and its datasets, so that a missing folder is found before the model is built.

    prepare: unpack and download what datasets need for that.
    """
    data = instantiate_from_config(config.data)
    data.seed, data.strict = settings.seed, strict
    # Not under a launcher: there every rank would prepare the data, while Lightning lets one rank do it.
    if isinstance(data, DataModuleFromConfig) and is_main_process() and "WORLD_SIZE" not in os.environ:
        if prepare:
            data.prepare_data()
        data.setup("fit")
        for name, dataset in data.datasets.items():
            size = counted(len(dataset), "sample") if hasattr(dataset, "__len__") else "a stream"
            logger.info("%-11s %s: %s, %s", "data", name, type(dataset).__name__, size)
    return data


def batches_of(data: Any, ranks: int) -> dict[str, int]:
    """Return the number of batches in an epoch of each rank, by split, of the datasets whose length is known."""
    if not isinstance(data, DataModuleFromConfig):
        return {}
    sizes = {split: len(each) for split, each in data.datasets.items() if hasattr(each, "__len__")}
    return {split: math.ceil(size / (data.batch_size * ranks)) for split, size in sizes.items()}


def _precision_text(trainer: pl.Trainer, accelerator: str) -> str:
    precision = str(trainer.precision)
    note = " (16-bit on the CPU is bfloat16)" if accelerator == "cpu" and precision == "bf16-mixed" else ""
    strategy = type(trainer.strategy).__name__.removesuffix("Strategy")
    ranks = f", {trainer.world_size} ranks ({strategy})" if trainer.world_size > 1 else ""
    return f"precision {precision}{note}{ranks}"
