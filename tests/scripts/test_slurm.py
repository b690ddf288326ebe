"""scripts/slurm/train.sbatch: the command that it starts, and the requeue of a run that saved itself."""

import os
import subprocess
from pathlib import Path

import pytest

from ldm.training.flags import parse

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm" / "train.sbatch"


@pytest.mark.parametrize("code, requeued", [(0, False), (1, False), (2, False), (143, True)])
def test_a_job_starts_main_and_is_requeued_only_after_sigterm(tmp_path, code, requeued):
    for name, result in (("srun", code), ("scontrol", 0)):
        stub = tmp_path / name
        stub.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/{name}.txt\nexit {result}\n')
        stub.chmod(0o755)
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **job}
    done = subprocess.run(["bash", str(SCRIPT), "--base", "a b.yaml", "-t"], env=environment)
    assert done.returncode == code
    words = (tmp_path / "srun.txt").read_text().splitlines()
    assert words[:3] == ["--kill-on-bad-exit=1", "python", "main.py"]
    options = parse(words[3:])
    assert options.base == ("a b.yaml",) and options.train and options.trainer == {"num_nodes": 2, "devices": "8"}
    assert (tmp_path / "scontrol.txt").exists() is requeued
    if requeued:
        assert (tmp_path / "scontrol.txt").read_text().split() == ["requeue", "17"]
