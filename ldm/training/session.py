"""A run from beginning to end: configs, objects, training, test; and what its process ends with."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.cli import EXIT_INTERRUPTED, EXIT_USAGE, one_line
from ldm.config import merge as configs
from ldm.config.instantiate import ConfigError, allow_targets, instantiate_from_config
from ldm.config.validate import check_class_count, forget_absent_weights
from ldm.training.flags import Options, UsageError, parse
from ldm.training.folder import RunFolder, new_run, resumed_run, saved_configs, with_checkpoint
from ldm.training.report import console, is_main_process
from ldm.training.settings import Settings, learning_rate, settle
from ldm.util import import_lightning

logger = logging.getLogger(__name__)

EXIT_FAILED = 1


class TrainingFailed(Exception):
    """An exception that ended training after it had begun; its cause is the exception."""


def main(argv: list[str] | None = None) -> int:
    """Run a command line -> exit code, see `ldm.training.flags.EPILOG`. Errors that the user can mend are one line on stderr."""
    argv = sys.argv[1:] if argv is None else list(argv)
    debug = any(word in ("-d", "--debug") for word in argv)
    try:
        options = parse(argv)
        debug = options.debug
        with console(debug):
            return run(options)
    except KeyboardInterrupt:
        print("stopped; nothing was saved", file=sys.stderr)
        return EXIT_INTERRUPTED
    except TrainingFailed as error:
        _show(error.__cause__, whole=not isinstance(error.__cause__, _one_line_errors()) or debug)
        _debugger(error.__cause__, debug)
        return EXIT_FAILED
    except Exception as error:
        if not isinstance(error, (UsageError, ValueError, OSError, ImportError, *_one_line_errors())):
            _show(error, whole=True)
            _debugger(error, debug)
            return EXIT_FAILED
        _show(error, whole=debug)
        return EXIT_USAGE


def run(options: Options) -> int:
    """Build what the options ask for, train where they say so, test where there is a test set -> exit code."""
    folder, config = prepare(options)
    settings = settle(options, config.lightning)
    if folder.resumed and options.seed is not None and options.seed != _saved_seed(folder):
        logger.warning(
            "%-11s %d, not the %s of the resumed run: it goes on, but not exactly",
            "seed",
            settings.seed,
            _saved_seed(folder),
        )
    if not options.train and not (config.data.get("params") or {}).get("test"):
        raise UsageError("nothing to do: -t trains, and data.params.test, which a run without -t evaluates, is not set")
    if folder.resumed:
        folder = with_checkpoint(folder)
    elif settings.start_from:
        folder = replace(folder, checkpoint=_existing(settings.start_from))
    return _execute(options, folder, config, settings)


def prepare(options: Options) -> tuple[RunFolder, DictConfig]:
    """The run folder and the merged, checked config; light, so that mistakes show before torch is imported.

    A resumed run's saved configs come before `--base`.
    """
    for prefix in options.allow_targets:
        allow_targets(prefix.rstrip("."))
    for path in options.base:
        configs.find_config(path)
    folder = resumed_run(options.resume) if options.resume else new_run(options)
    files = saved_configs(folder) if folder.resumed else []
    config = configs.merge([*files, *map(configs.find_config, options.base)], options.overrides)
    if folder.resumed and options.train:
        configs.check(config, weights=False)
        typed = [override.partition("=")[0].lstrip("+") for override in options.overrides]
        for gone in forget_absent_weights(config, typed):
            logger.info("%-11s %s: no such file any more; the run's checkpoint holds its weights", "weights", gone)
    configs.check(config)
    if config.get("lightning") is None:
        config["lightning"] = {}
    return folder, config


def _execute(options: Options, folder: RunFolder, config: DictConfig, settings: Settings) -> int:
    sources = [*([f"{folder.path}/configs"] if folder.resumed else []), *options.base, *options.overrides]
    logger.info("%-11s %s", "config", ", ".join(sources))
    from ldm.training.devices import this_machine  # from here on torch is imported

    devices = settings.devices(this_machine())
    rate = (
        learning_rate(config, settings, devices.count * int(settings.trainer.get("num_nodes", 1)))
        if options.train
        else None
    )
    pl = import_lightning()
    logging.getLogger("pytorch_lightning").setLevel(logging.DEBUG if options.debug else logging.WARNING)
    pl.seed_everything(settings.seed, verbose=False)
    data = _build_data(config, settings)
    check_class_count(config, getattr(data, "datasets", {}))
    model = instantiate_from_config(config.model)
    if rate is not None:
        model.learning_rate = rate.value
    from ldm.training.build import build_trainer

    trainer = build_trainer(config, settings, devices, folder, model, rate)
    logger.info("%-11s %s, %s", "device", devices.text, _precision_text(trainer, devices.accelerator))
    logger.info("%-11s %s", "run folder", folder.path)
    if options.train:
        code = fit(trainer, model, data, folder)
        if code != 0:
            return code
    if not options.no_test:
        test(trainer, model, data, config, asked=not options.train)
    return 0


def fit(trainer: Any, model: Any, data: Any, folder: RunFolder) -> int:
    """Train -> 0, or the exit code of the signal that stopped it. Raises TrainingFailed for an exception after the first batch began."""
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from ldm.callbacks import SignalCallback, StepSeed, Stopped

    signals, steps = (
        next(each for each in trainer.callbacks if isinstance(each, kind)) for kind in (SignalCallback, StepSeed)
    )
    try:
        trainer.fit(
            model, data, ckpt_path=None if folder.checkpoint is None else str(folder.checkpoint), weights_only=True
        )
    except Stopped as stop:
        how = f"go on with --resume {folder.path}" if stop.checkpoint else "nothing was saved"
        logger.info("%-11s by %s at step %d; %s", "stopped", stop.reason, trainer.global_step, how)
        return stop.exit_code
    except SystemExit:  # Lightning's answer to a KeyboardInterrupt
        return EXIT_INTERRUPTED
    except MisconfigurationException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except KeyError as error:
        if folder.checkpoint is not None and "checkpoint contains only the model" in str(error):
            raise ConfigError(
                f"{folder.checkpoint} holds weights alone, and a run needs its optimizers' state to go on; start a new run from it "
                f"with model.params.ckpt_path={folder.checkpoint}"
            ) from error
        raise TrainingFailed from error
    except ConfigError:
        raise
    except Exception as error:
        if steps.began or not isinstance(error, ValueError | OSError):
            raise TrainingFailed from error
        raise
    finally:
        signals.restore()
    if not steps.began and trainer.limit_train_batches != 0:
        at = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        limits = f"max_epochs {trainer.max_epochs}, max_steps {trainer.max_steps}"
        logger.warning("%-11s no step was made: the run is at %s already (%s)", "trained", at, limits)
    return 0


def test(trainer: Any, model: Any, data: Any, config: DictConfig, asked: bool) -> None:
    """Evaluate the test set, where the config has one and the model can."""
    from pytorch_lightning.utilities.model_helpers import is_overridden

    if not (config.data.get("params") or {}).get("test"):
        return
    if not is_overridden("test_step", model):
        if asked:
            raise ConfigError(f"data.params.test: {type(model).__name__} has no test_step")
        logger.info("%-11s left out: %s has no test_step", "test", type(model).__name__)
        return
    for figures in trainer.test(model, data, verbose=False):
        logger.info("%-11s %s", "test", ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))


def _build_data(config: DictConfig, settings: Settings) -> Any:
    """The data module, its datasets built at once where it builds them only once: a missing folder shows before the model is built."""
    from ldm.data.datamodule import DataModuleFromConfig

    data = instantiate_from_config(config.data)
    data.seed = settings.seed
    # Where others launch the ranks, each would prepare; Lightning lets one of them do it.
    if isinstance(data, DataModuleFromConfig) and is_main_process() and "WORLD_SIZE" not in os.environ:
        data.prepare_data()
        data.setup("fit")
        for name, dataset in data.datasets.items():
            size = f"{len(dataset):,} samples" if hasattr(dataset, "__len__") else "a stream"
            logger.info("%-11s %s: %s, %s", "data", name, type(dataset).__name__, size)
    return data


def _existing(path: str) -> Path:
    from ldm.checkpoint import verify_checkpoint

    file = Path(path).expanduser()
    verify_checkpoint(file)
    return file.resolve()


def _saved_seed(folder: RunFolder) -> Any:
    return OmegaConf.select(configs.merge(saved_configs(folder)), "lightning.seed")


def _precision_text(trainer: Any, accelerator: str) -> str:
    precision = str(trainer.precision)
    note = " (16-bit on the CPU is bfloat16)" if accelerator == "cpu" and precision == "bf16-mixed" else ""
    strategy = type(trainer.strategy).__name__.removesuffix("Strategy")
    ranks = f", {trainer.world_size} ranks ({strategy})" if trainer.world_size > 1 else ""
    return f"precision {precision}{note}{ranks}"


def _one_line_errors() -> tuple[type[BaseException], ...]:
    """Errors whose message says all; known only once what raises them has been imported."""
    found = [ConfigError]
    for module, name in (
        ("ldm.models.training", "NonFiniteError"),
        ("ldm.checkpoint", "CheckpointError"),
        ("ldm.data.image", "BadImageError"),
    ):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def _show(error: BaseException | None, whole: bool) -> None:
    if error is None:
        return
    if whole:
        traceback.print_exception(error)
    notes = "".join(f", {note}" for note in getattr(error, "__notes__", [])[:1])
    hint = "" if whole or isinstance(error, (UsageError, *_one_line_errors())) else " (--debug shows where)"
    print(f"error: {one_line(error)}{notes}{hint}", file=sys.stderr)


def _debugger(error: BaseException | None, debug: bool) -> None:
    if debug and error is not None and sys.stdin.isatty():
        import pdb

        pdb.post_mortem(error.__traceback__)
