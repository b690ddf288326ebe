"""A training run from command line to exit code: parse, merge and check, then import torch and execute."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from omegaconf import OmegaConf

from ldm.cli import EXIT_INTERRUPTED, import_lightning
from ldm.config.instantiate import ConfigError, allow_targets
from ldm.config.merge import find_config, merge
from ldm.config.validate import check_config, forget_missing_weights
from ldm.training.flags import RunOptions, parse
from ldm.training.report import console, report_error
from ldm.training.run_directory import new_run, resumed_run, saved_configs
from ldm.training.settings import resolve_settings

logger = logging.getLogger(__name__)


def run_training(argv: Sequence[str] | None = None) -> int:
    """Run a command line of main.py and return its exit code, see `ldm.training.flags.EPILOG`."""
    try:
        options = parse(argv)
    except SystemExit as stop:  # --help, or invalid flags
        return int(stop.code or 0)
    try:
        with console(options.debug):
            return _run(options)
    except KeyboardInterrupt:
        print("stopped; nothing was saved", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        return report_error(error, options.debug)


def _run(options: RunOptions) -> int:
    for prefix in options.allow_targets:
        allow_targets(prefix.rstrip("."))
    base = [find_config(path) for path in options.base]
    directory = resumed_run(options.resume) if options.resume else new_run(options)
    saved = merge(saved_configs(directory) if directory.resumed else [])
    saved_seed = OmegaConf.select(saved, "lightning.seed")
    config = merge(base, options.overrides, onto=saved)
    if directory.resumed and options.train:
        typed = [override.partition("=")[0].lstrip("+") for override in options.overrides]
        for missing in forget_missing_weights(config, typed):
            logger.info("%-11s %s: no such file; the run's checkpoint holds its weights", "weights", missing)
    check_config(config)
    if config.get("lightning") is None:
        config["lightning"] = {}
    settings = resolve_settings(options, config.lightning)
    if directory.resumed and options.seed not in (None, saved_seed):
        logger.warning("%-11s %d, but the run has %s: resuming is not exact", "seed", settings.seed, saved_seed)
    if not options.train and not (config.data.get("params") or {}).get("test"):
        raise ConfigError("nothing to do: pass -t to train, or set data.params.test to evaluate")
    sources = [*([f"{directory.path}/configs"] if directory.resumed else []), *options.base, *options.overrides]
    logger.info("%-11s %s", "config", ", ".join(sources))

    import_lightning()  # imported here, after all checks that need neither torch nor Lightning
    from ldm.training.run import execute

    return execute(options, directory, config, settings)
