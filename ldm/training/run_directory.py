"""Run directories: where a new run writes, and what a resumed one continues from."""

from __future__ import annotations

import datetime
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ldm.config.instantiate import ConfigError
from ldm.training.flags import RunOptions


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


def timestamp() -> str:
    return datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")


def new_run(options: RunOptions, now: str | None = None) -> RunDirectory:
    """Return the directory of a new run without creating it; an existing name gets a number appended."""
    now = now or timestamp()
    name = options.name or (Path(options.base[0]).stem if options.base else "")
    stem = now + (f"_{_file_name(name, '--name')}" if name else "") + _file_name(options.postfix, "--postfix")
    root = Path(options.logdir, *(["debug_runs"] if options.debug else []), _file_name(options.project, "--project"))
    path, number = root / stem, 2
    while path.exists():
        path, number = root / f"{stem}-{number}", number + 1
    return RunDirectory(path, now)


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
    given = Path(path).expanduser()
    if given.is_dir():
        return RunDirectory(given.resolve(), timestamp(), resumed=True)
    if not given.is_file():
        raise ConfigError(f"--resume {path}: no such file or directory{_newest_run(given)}")
    file = given.resolve()
    directory = file.parents[1]
    if not (directory / "configs").is_dir():
        raise ConfigError(
            f"--resume {path}: {directory} is not a run directory (it has no configs/). To start a new run from the "
            "file's full state give --base and --resume_from_checkpoint; for its weights alone, model.params.ckpt_path"
        )
    return RunDirectory(directory, timestamp(), file, resumed=True)


def saved_configs(directory: RunDirectory) -> list[Path]:
    """Return the configs that earlier starts of a run saved, in the order of merging."""
    files = sorted(directory.configs.glob("*.yaml"))
    if not files:
        raise ConfigError(f"--resume {directory.path}: no saved configs (configs/*.yaml)")
    return files


def _newest_run(path: Path) -> str:
    parent = path.parent if path.suffix == "" else path.parents[min(2, len(path.parents) - 1)]
    entries = sorted(parent.iterdir()) if parent.is_dir() else []
    runs = [entry.name for entry in entries if (entry / "checkpoints").is_dir()]
    return f"; the newest run in {parent} is {runs[-1]}" if runs else ""
