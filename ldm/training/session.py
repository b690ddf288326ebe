"""A training run from command line to exit code: parse, merge and check, then import torch and execute."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from ldm.cli import (
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    Stopped,
    collector_off,
    exit_at_once,
    import_lightning,
    stop_on_signals,
)
from ldm.config.instantiate import ConfigError, allow_targets
from ldm.config.merge import changes, find_config, merge
from ldm.config.validate import check_config, forget_missing_weights
from ldm.machine.cores import share_cores
from ldm.training.flags import RunOptions, parse
from ldm.training.launch import Launch, hold
from ldm.training.report import console, report_error
from ldm.training.run_directory import new_run, resumed_run, saved_configs
from ldm.training.settings import resolve_settings

logger = logging.getLogger(__name__)

_NOT_CHANGES = ("lightning.trainer.enable_progress_bar",)


def run_training(argv: Sequence[str] | None = None) -> int:
    """Run a command line of main.py and return its exit code, see `ldm.training.flags.EPILOG`."""
    try:
        options = parse(argv)
    except SystemExit as stop:  # --help, or invalid flags
        return int(stop.code or 0)
    if argv is None:
        share_cores()
    try:
        with console(options.debug):
            return _run(options, list(sys.argv[1:] if argv is None else argv))
    except Stopped as stop:
        print(f"stopped by {stop.reason}; nothing was saved", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("stopped; nothing was saved", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        return report_error(error, options.debug)


def _run(options: RunOptions, words: list[str]) -> int:
    options = replace(options, train=options.train or options.doctor)
    for prefix in options.allow_targets:
        allow_targets(prefix.rstrip("."))
    base = [find_config(path) for path in options.base]
    launch = Launch(words)
    directory = resumed_run(options.resume) if options.resume else launch.restarted_run(options) or new_run(options)
    saved = merge(saved_configs(directory, base) if directory.resumed else [])
    before = OmegaConf.to_container(saved)
    config = merge(base, options.overrides, onto=saved)
    if directory.resumed and options.train and directory.has_checkpoints:
        typed = [override.partition("=")[0].lstrip("+~") for override in options.overrides]
        for missing in forget_missing_weights(config, typed):
            logger.info("%-11s %s: no such file; the run's checkpoint holds its weights", "weights", missing)
    check_config(config, problems=not options.doctor)
    if config.get("lightning") is None:
        config["lightning"] = {}
    settings = resolve_settings(options, config.lightning)
    if directory.resumed:
        sections: Any = OmegaConf.to_container(config)
        log_changes(before, {**sections, "lightning": OmegaConf.to_container(settings.lightning)})
    datasets = config.data.get("params") or {}
    if not options.train and not datasets.get("test"):
        raise ConfigError("nothing to do: pass -t to train, or set data.params.test to evaluate")
    if options.train and not datasets.get("train") and config.data.target.endswith(".DataModuleFromConfig"):
        raise ConfigError("data.params.train: missing; -t needs the training dataset, with its target and params")
    sources = [*([f"{directory.path}/configs"] if directory.resumed else []), *options.base, *options.overrides]
    logger.info("%-11s %s", "config", ", ".join(sources))

    exit_at_once()
    import_lightning()  # imported here, after all checks that need neither torch nor Lightning
    with collector_off():
        from ldm.training.run import execute

    if options.doctor:
        from ldm.training.doctor import examine

        with stop_on_signals():
            report, found = examine(options, directory, config, settings)
        print(report)
        return EXIT_USAGE if found else 0

    with stop_on_signals(), hold(directory, launch if options.train else None) as held:
        return execute(options, held, config, settings)


def log_changes(before: Any, after: Any) -> None:
    """Log every value of a config that differs from the one that the run was saved with, one line each."""
    for name, old, new in changes(before, after):
        if name not in _NOT_CHANGES:
            logger.warning("%-11s %s: %s -> %s", "changed", name, old, new)
            if name == "lightning.seed":
                logger.warning("%-11s resuming with another seed is not exact", "changed")
