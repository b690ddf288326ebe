"""The start of a process in a run directory: find the run that a job restarts; create and lock the directory."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ldm.atomic import save_text
from ldm.config.files import load_json
from ldm.config.instantiate import ConfigError
from ldm.training.flags import RunOptions
from ldm.training.report import is_main_process
from ldm.training.run_directory import RunDirectory, log_folder, numbered, timestamp

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)


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
# Variables by which Lightning finds the other nodes: torchrun, SLURM, MPI, LSF, Kubeflow, or set by hand.
_NODES = ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "LSB_JOBID", "MASTER_ADDR")


def check_nodes(count: int) -> None:
    """Raise ConfigError for several nodes without a launcher: the process would wait for the others for ever."""
    if count > 1 and not any(name in os.environ for name in _NODES):
        raise ConfigError(
            f"--num_nodes {count}: start the command on every node by torchrun or srun, as docs/scale.md shows; or set "
            "MASTER_ADDR, MASTER_PORT and NODE_RANK on each"
        )


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
    """Create and lock a run's directory; remove it again if it stays empty, or holds only configs of a refused run.

    A new directory gets another name if one of this name was created in the meantime. The lock ends with the process.
    launch: saved in a new directory; None neither creates nor locks. Raises ConfigError if another process holds it.
    """
    if launch is None or not is_main_process():
        yield directory
        return
    if not directory.resumed:
        for path in numbered(directory.path):
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            directory = replace(directory, path=path)
            break
    with _locked(directory.path / ".lock", directory.path):
        if not directory.resumed:
            launch.save(directory)
        refused = False
        try:
            yield directory
        except Exception as error:
            refused = any(isinstance(each, ConfigError) for each in (error, error.__cause__))
            raise
        finally:
            own = {directory.path / ".lock", directory.configs / Launch.FILE}
            # TensorBoard's writer creates its file when it is built, before the model is checked.
            folders = {"tensorboard", *(["configs"] if refused else [])}
            files = (path for path in directory.path.rglob("*") if path.is_file())
            if not directory.resumed and all(path in own or path.parent.name in folders for path in files):
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
