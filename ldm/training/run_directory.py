"""Run directories: where a new run writes, and what a resumed one continues from."""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from ldm.atomic import save_text
from ldm.config.files import load_json, load_yaml
from ldm.config.instantiate import ConfigError
from ldm.training.flags import RunOptions
from ldm.training.report import is_main_process

if sys.platform != "win32":
    import fcntl

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
    return RunDirectory(next(path for path in _numbered(root / stem) if not path.exists()), now)


def _numbered(path: Path) -> Iterator[Path]:
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


class Launch:
    """The launch of a run: its command line and, under torchrun or SLURM, the job with its number of restarts.

    A run directory keeps it, so that the restarted command finds its run.
    """

    FILE = "launch.json"

    def __init__(self, words: Sequence[str]) -> None:
        self.words, self.restarts = list(words), _jobs()

    def save(self, directory: RunDirectory) -> None:
        text = json.dumps({"command": self.words, "restarts": self.restarts}, indent=1)
        save_text(directory.configs / self.FILE, text)

    def restarted_run(self, options: RunOptions) -> RunDirectory | None:
        """Return the run that this launch restarts; None if it is no restart, or if the run was not created yet."""
        restarted = {job: number for job, number in self.restarts.items() if number > 0}
        if not restarted or not options.train:
            return None
        files = log_folder(options).glob(f"*/configs/{self.FILE}")
        for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
            try:
                saved = load_json(file)
            except (OSError, ValueError):
                continue
            before = saved.get("restarts") if saved.get("command") == self.words else None
            for job, number in restarted.items():
                if isinstance(before, dict) and before.get(job, number) < number:
                    logger.info("%-11s restart %d of %s continues %s", "restart", number, job, file.parents[1])
                    return RunDirectory(file.parents[1].resolve(), timestamp(), resumed=True)
        job, number = next(iter(restarted.items()))
        if job == _NO_ID:
            raise ConfigError(
                "a restart by torchrun on several nodes cannot find its run without an id: add torchrun --rdzv-id NAME"
            )
        logger.info("%-11s %d of %s: it has no run in %s yet", "restart", number, job, log_folder(options))
        return None


_NO_ID = "torchrun without an id"


def _jobs() -> dict[str, int]:
    """Return the jobs that this process belongs to and how often each was restarted, from the environment."""
    jobs = {}
    environ = os.environ
    if (name := environ.get("TORCHELASTIC_RUN_ID")) is not None:
        if name == "none":  # torchrun's default is no id: the agent, which outlives a restart, identifies the job
            name = f"of process {os.getppid()} on {platform.node()}, {_start_time(os.getppid())}"
            several = environ.get("GROUP_WORLD_SIZE", "1") != "1"
        else:
            several = False
        jobs[_NO_ID if several else f"torchrun {name}"] = int(environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if "SLURM_JOB_ID" in environ:
        array = [environ[key] for key in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID") if key in environ]
        name = "_".join(array) if len(array) == 2 else environ["SLURM_JOB_ID"]
        jobs[f"SLURM job {name}"] = int(environ.get("SLURM_RESTART_COUNT") or 0)
    return jobs


def _start_time(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


@contextmanager
def hold(directory: RunDirectory, launch: Launch | None) -> Iterator[RunDirectory]:
    """Create and lock the directory of a run; remove it again if nothing was written.

    A new directory gets another name if one of this name was created in the meantime. The lock ends with the process.
    launch: saved in a new directory; None neither creates nor locks. Raises ConfigError if another process holds it.
    """
    if launch is None or not is_main_process():
        yield directory
        return
    if not directory.resumed:
        for path in _numbered(directory.path):
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            directory = replace(directory, path=path)
            break
    with _locked(directory.path / ".lock", directory.path):
        if not directory.resumed:
            launch.save(directory)
        try:
            yield directory
        finally:
            own = {directory.path / ".lock", directory.configs / Launch.FILE}
            if not directory.resumed and {path for path in directory.path.rglob("*") if path.is_file()} <= own:
                shutil.rmtree(directory.path, ignore_errors=True)


@contextmanager
def _locked(file: Path, directory: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    # A record lock: unlike flock's, data workers that survive a killed process for seconds do not keep it.
    with open(file, "a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise ConfigError(f"{directory}: in use by {owner}; stop that process first, or wait for its end") from None
        except OSError as error:
            logger.warning("%-11s %s cannot be locked (%s): start no second process there", "lock", directory, error)
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} on {platform.node()} since {timestamp()}\n")
        lock.flush()
        yield


def _newest_run(path: Path) -> str:
    parent = path.parent if path.suffix == "" else path.parents[min(2, len(path.parents) - 1)]
    entries = sorted(parent.iterdir()) if parent.is_dir() else []
    runs = [entry.name for entry in entries if (entry / "checkpoints").is_dir()]
    return f"; the newest run in {parent} is {runs[-1]}" if runs else ""
