"""Run folders: where a new run writes, and what a resumed one goes on from."""

from __future__ import annotations

import datetime
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ldm.config.instantiate import ConfigError
from ldm.training.flags import Options


@dataclass(frozen=True)
class RunFolder:
    """`logs/<time>_<name><postfix>`; `now` is this start's time, which names the configs that it saves."""

    path: Path
    now: str
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


def new_run(options: Options, now: str | None = None) -> RunFolder:
    """The folder of a new run; nothing is made yet. A name that is taken gets a number, for two runs may start in one second."""
    now = now or timestamp()
    name = options.name or (Path(options.base[0]).stem if options.base else "")
    stem = (
        now
        + (f"_{_file_name(name, '--name')}" if name else "")
        + (_file_name(options.postfix, "--postfix") if options.postfix else "")
    )
    root = Path(options.logdir)
    if options.debug:
        root = root / "debug_runs"
    if options.project:
        root = root / _file_name(options.project, "--project")
    path, number = root / stem, 2
    while path.exists():
        path, number = root / f"{stem}-{number}", number + 1
    return RunFolder(path, now)


def _file_name(text: str, flag: str) -> str:
    """`text` if it may be a part of one file name: runs never write outside of the log folder."""
    if len(os.fsencode(text)) > 100 or text in (".", "..") or re.search(r'[/\\\x00-\x1f:*?"<>|]', text):
        raise ConfigError(
            f'{flag} {text[:60]!r}: expected a part of a file name: up to 100 bytes, without / \\ : * ? " < > |'
        )
    return text


def resumed_run(path: str, now: str | None = None) -> RunFolder:
    """The run that `--resume` names: by its folder, or by a checkpoint file two levels below it; the file is not looked into yet.

    Raises ConfigError where nothing usable is there.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        return RunFolder(given.resolve(), now or timestamp(), resumed=True)
    if not given.is_file():
        raise ConfigError(f"--resume {path}: there is no such file or folder{_runs_near(given)}")
    file = given.resolve()
    folder = file.parents[1]
    if not (folder / "configs").is_dir():
        raise ConfigError(
            f"--resume {path}: {folder} is no run folder (it has no configs/). To start a new run from a file's full state give "
            f"--base and --resume_from_checkpoint; for its weights alone set model.params.ckpt_path"
        )
    return RunFolder(folder, now or timestamp(), file, resumed=True)


def with_checkpoint(folder: RunFolder) -> RunFolder:
    """A resumed run's folder with the file that it goes on from, which has been read as a whole.

    A damaged or missing `last.ckpt` gives way to the newest checkpoint that is whole (both are named in the log); any other
    file that is damaged is refused. Raises CheckpointError.
    """
    from ldm.checkpoint import verify_checkpoint
    from ldm.checkpoint.resume import find_checkpoint

    if folder.checkpoint is None or folder.checkpoint.name == "last.ckpt":
        return replace(folder, checkpoint=find_checkpoint(folder.path))
    verify_checkpoint(folder.checkpoint)
    return folder


def saved_configs(folder: RunFolder) -> list[Path]:
    """The configs that earlier starts of a run saved, in the order in which they are merged."""
    files = sorted(folder.configs.glob("*.yaml"))
    if not files:
        raise ConfigError(f"--resume {folder.path}: it holds no saved configs (configs/*.yaml)")
    return files


def _runs_near(path: Path) -> str:
    parent = path.parent if path.suffix == "" else path.parents[min(2, len(path.parents) - 1)]
    runs = (
        sorted(entry.name for entry in parent.iterdir() if (entry / "checkpoints").is_dir()) if parent.is_dir() else []
    )
    return f"; the newest run in {parent} is {runs[-1]}" if runs else ""
