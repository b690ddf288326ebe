"""Directories of runs: created, locked and found again by restarted jobs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.config.instantiate import ConfigError
from ldm.training.flags import RunOptions
from ldm.training.launch import _NODES, Launch, check_nodes, hold
from ldm.training.run_directory import RunDirectory, new_run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("resumed", [True, False])
def test_a_directory_is_used_by_one_process_at_a_time(tmp_path, resumed):
    """A lock of a process that died, as of the first one here, is taken over."""
    run = tmp_path / "run"
    run.mkdir()
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from ldm.training.launch import Launch, hold\n"
        "from ldm.training.run_directory import RunDirectory\n"
        "with hold(RunDirectory(Path(sys.argv[1]), 'T', resumed=True), Launch([])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, run], cwd=ROOT, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    directory = RunDirectory(run, "T", resumed=resumed)
    if resumed:
        with (
            pytest.raises(ConfigError, match=rf"run: in use by process {other.pid} on .* since"),
            hold(directory, Launch([])),
        ):
            pass
    else:
        with hold(directory, Launch([])) as held:
            assert held.path == tmp_path / "run-2"
    other.kill()
    other.wait()
    with hold(RunDirectory(run, "T", resumed=True), Launch([])):
        assert f"process {os.getpid()} on" in (run / ".lock").read_text()


def test_a_new_directory_in_which_nothing_was_written_is_removed(tmp_path):
    with hold(RunDirectory(tmp_path / "logs" / "T", "T"), Launch([])) as held:
        (held.path / "tensorboard").mkdir()
        (held.path / "tensorboard" / "events").touch()  # TensorBoard's, when its writer is built
    assert not held.path.exists()
    with hold(held, Launch([])):
        (held.path / "metrics.csv").touch()
    assert held.path.exists()


@pytest.mark.parametrize("error", [ConfigError("a"), RuntimeError("b")])
def test_a_refused_run_leaves_no_directory_for_its_configs(tmp_path, error):
    with pytest.raises(type(error)), hold(RunDirectory(tmp_path / "logs" / "T", "T"), Launch([])) as held:
        (held.configs / "T-project.yaml").touch()
        raise error
    assert held.path.exists() is isinstance(error, RuntimeError)


def test_several_nodes_need_a_launcher(monkeypatch):
    for name in _NODES:
        monkeypatch.delenv(name, raising=False)
    check_nodes(1)
    with pytest.raises(ConfigError, match="--num_nodes 2: start the command on every node by torchrun or srun"):
        check_nodes(2)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    check_nodes(2)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": "0"}
UNNAMED = {**TORCHRUN, "TORCHELASTIC_RUN_ID": "none"}
SLURM = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "0"}
ARRAY = {"SLURM_JOB_ID": "18", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "1"}


@pytest.mark.parametrize(
    "first, second, found",
    [
        (TORCHRUN, {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"}, True),
        (TORCHRUN, TORCHRUN, False),
        (TORCHRUN, {**TORCHRUN, "TORCHELASTIC_RUN_ID": "other", "TORCHELASTIC_RESTART_COUNT": "1"}, False),
        (UNNAMED, {**UNNAMED, "TORCHELASTIC_RESTART_COUNT": "2"}, True),
        (SLURM, {**SLURM, "SLURM_RESTART_COUNT": "1"}, True),
        (ARRAY, {**ARRAY, "SLURM_RESTART_COUNT": "1"}, True),
        (ARRAY, {**ARRAY, "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "1"}, False),
        ({**SLURM, **TORCHRUN}, {**SLURM, **TORCHRUN, "SLURM_RESTART_COUNT": "1"}, True),
        ({}, {}, False),
    ],
)
def test_a_restarted_job_finds_its_run(tmp_path, monkeypatch, first, second, found):
    options = RunOptions(base=("a.yaml",), logdir=str(tmp_path), train=True)

    def launch(environment, words=("-b", "a.yaml", "-t")):
        for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", *SLURM, *ARRAY):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return Launch(words)

    with hold(new_run(options, "T"), launch(first)) as held:
        (held.path / "a file").touch()
    restarted = launch(second).restarted_run(options)
    assert (restarted is not None) == found
    if restarted is not None:
        assert restarted.path == held.path and restarted.resumed
        assert launch(second, ["-b", "b.yaml", "-t"]).restarted_run(options) is None
        assert (
            launch({**second, "TORCHELASTIC_RESTART_COUNT": "0", "SLURM_RESTART_COUNT": "0"}).restarted_run(options)
            is None
        )


def test_a_restart_on_several_nodes_without_an_id_is_refused(tmp_path, monkeypatch):
    for name, value in {**UNNAMED, "TORCHELASTIC_RESTART_COUNT": "1", "GROUP_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    options = RunOptions(base=("a.yaml",), logdir=str(tmp_path), train=True)
    with pytest.raises(ConfigError, match="--rdzv-id NAME"):
        Launch(["-t"]).restarted_run(options)
