"""Run directories: where a new run writes, and what a resumed one continues from."""

from __future__ import annotations

import datetime
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from ldm.config.files import load_yaml
from ldm.config.instantiate import ConfigError
from ldm.paths import expand_user
from ldm.training.flags import RunOptions

logger = logging.getLogger(__name__)

_SECTIONS = {"project": ("model", "data"), "lightning": ("lightning",)}  # of the configs that a start saves


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory, `logs/<time>_<name><postfix>`."""

    path: Path
    now: str  # time of this start, in the names of the configs that it saves
    checkpoint: Path | None = None  # the full state that training starts from
    resumed: bool = False

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def configs(self) -> Path:
        return self.path / "configs"

    @property
    def has_checkpoints(self) -> bool:
        return self.checkpoint is not None or any(
            path.name != "crash.ckpt" and not path.name.startswith(".") for path in self.checkpoints.rglob("*.ckpt")
        )


def timestamp() -> str:
    return datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")


def new_run(options: RunOptions, now: str | None = None) -> RunDirectory:
    """Return the directory of a new run without creating it; an existing name gets a number appended."""
    now = now or timestamp()
    name = options.name or (Path(options.base[0]).stem if options.base else "")
    stem = now + (f"_{_file_name(name, '--name')}" if name else "") + _file_name(options.postfix, "--postfix")
    root = log_folder(options)
    return RunDirectory(next(path for path in numbered(root / stem) if not path.exists()), now)


def numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in count(2):
        yield path.with_name(f"{path.name}-{number}")


def log_folder(options: RunOptions) -> Path:
    return Path(options.logdir, *(["debug_runs"] if options.debug else []), _file_name(options.project, "--project"))


def _file_name(text: str, flag: str) -> str:
    """Return `text` if it is valid within a file name, so that runs never write outside the log folder."""
    if len(os.fsencode(text)) > 100 or text in (".", "..") or re.search(r'[/\\\x00-\x1f:*?"<>|]', text):
        limits = 'up to 100 bytes, without / \\ : * ? " < > |'
        raise ConfigError(f"{flag} {text[:60]!r}: expected part of a file name: {limits}")
    return text


def resumed_run(path: str) -> RunDirectory:
    """Return the run that `--resume` names by its directory or by a checkpoint in its checkpoints/ folder.

    Raises ConfigError if there is no such run; does not read the checkpoint.
    """
    given = expand_user(path)
    if given.is_dir():
        return RunDirectory(given.resolve(), timestamp(), resumed=True)
    if not given.is_file():
        raise ConfigError(f"--resume {path}: no such file or directory{_newest_run(given)}")
    file = given.resolve()
    directory = file.parents[1]
    if file.suffix == ".safetensors":
        raise ConfigError(f"--resume {path}: weights without the state of a run; pass {directory} or a .ckpt in it")
    if not (directory / "configs").is_dir():
        raise ConfigError(
            f"--resume {path}: {directory} is not a run directory (it has no configs/). To start a new run from the "
            "file's full state give --base and --resume_from_checkpoint; for its weights alone, model.params.ckpt_path"
        )
    return RunDirectory(directory, timestamp(), file, resumed=True)


def saved_configs(directory: RunDirectory, base: Sequence[Path] = ()) -> list[Path]:
    """Return the newest configs that a run saved, one of each kind, in the order of merging.

    Every start saves all values: older files would bring back keys that were deleted since. A damaged file is skipped,
    with a warning, for an older one of its kind (or `base`, the configs given again). Raises ConfigError without any.
    """
    files: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(directory.configs.glob("*.yaml")):
        files[next((kind for kind in _SECTIONS if file.stem.endswith(f"-{kind}")), file.stem)].append(file)
    if not files and not base:
        raise ConfigError(f"--resume {directory.path}: no saved configs (configs/*.yaml)")
    if not base and files.keys() == {"lightning"}:
        advice = f"restore it, or give the configs of the run again: --resume {directory.path} --base CONFIG.yaml"
        raise ConfigError(f"{directory.configs}/*-project.yaml: missing; {advice}")
    if not base and files.keys() == {"project"}:
        problem = f"{directory.configs}/*-lightning.yaml: missing; the Trainer's settings are the defaults"
        logger.warning("%-11s %s", "config", problem)
    newest = []
    for kind, of_kind in files.items():
        problems = []
        for file in reversed(of_kind):
            try:
                content = load_yaml(file)
                if missing := [key for key in _SECTIONS.get(kind, ()) if key not in content]:
                    raise ConfigError(f"{file}: damaged: it has no section {missing[0]}")
                newest.append(file)
                break
            except ConfigError as error:
                problems.append(str(error))
        if len(problems) == len(of_kind) and not base:
            advice = f"restore it, or give the configs of the run again: --resume {directory.path} --base CONFIG.yaml"
            raise ConfigError(f"{problems[0]}; {advice}")
        for problem in problems:
            logger.warning("%-11s skipped: %s; changes made at that start are lost", "config", problem)
    return sorted(newest)


def _newest_run(path: Path) -> str:
    parent = path.parent if path.suffix == "" else path.parents[min(2, len(path.parents) - 1)]
    entries = sorted(parent.iterdir()) if parent.is_dir() else []
    runs = [entry.name for entry in entries if (entry / "checkpoints").is_dir()]
    return f"; the newest run in {parent} is {runs[-1]}" if runs else ""
