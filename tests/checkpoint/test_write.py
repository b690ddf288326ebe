"""Writing of checkpoints: plain values only, and a file is complete or absent."""

import collections
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm import atomic
from ldm.checkpoint import CheckpointError, CheckpointWriteError, write, write_checkpoint
from ldm.training.checkpoint_io import AtomicCheckpointIO


def test_a_checkpoint_holds_plain_values_whatever_was_given(tmp_path):
    given = {
        "state_dict": collections.OrderedDict(w=nn.Parameter(torch.ones(2))),
        "config": OmegaConf.create({"a": [1, {"b": 2.5}]}),
        "lr": np.float64(0.1),
        "betas": (np.float32(0.5), 0.999),
        "array": np.arange(3),
        "path": Path("logs"),
        "ids": {1, 2},
    }
    write_checkpoint(given, tmp_path / "a.ckpt")
    read = torch.load(tmp_path / "a.ckpt", weights_only=True)  # no stub is needed
    assert read["config"] == {"a": [1, {"b": 2.5}]} and type(read["config"]) is dict
    assert (read["lr"], read["betas"], read["path"], read["ids"]) == (0.1, (0.5, 0.999), "logs", {1, 2})
    assert torch.equal(read["array"], torch.arange(3)) and torch.equal(read["state_dict"]["w"], torch.ones(2))


def test_a_value_without_plain_form_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"checkpoint\['hyper'\]\[1\] is a builtins.object"):
        write_checkpoint({"hyper": [1, object()]}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["no space", "file size limit", "torch's own error", "damaged on the disk"])
def test_a_disk_that_refuses_leaves_the_previous_file_intact(tmp_path, monkeypatch, fault):
    path = tmp_path / "last.ckpt"
    write_checkpoint({"step": 1}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault == "file size limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    elif fault == "damaged on the disk":
        monkeypatch.setattr(write, "_torch_save", lambda content, target: target.write_bytes(b"PK\x03\x04 half of it"))
    else:
        error = (
            OSError(28, "No space left on device") if fault == "no space" else RuntimeError("unexpected pos 64 vs 0")
        )
        monkeypatch.setattr(torch, "save", lambda *args, **kwargs: (_ for _ in ()).throw(error))
    try:
        with pytest.raises(
            CheckpointWriteError, match=r"last.ckpt: could not be written: .*; the previous file is intact"
        ) as caught:
            write_checkpoint({"step": 2, "w": torch.zeros(50_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
    if fault != "damaged on the disk":
        assert "200,000 bytes" in str(caught.value)
    if fault == "file size limit":
        assert "File too large" in str(caught.value)


@pytest.mark.parametrize(
    ("point", "step"), [("while writing", 1), ("before fsync", 1), ("before rename", 1), ("after rename", 2)]
)
def test_kill_9_inside_the_write_leaves_a_whole_file(tmp_path, point, step):
    path = tmp_path / "last.ckpt"
    write_checkpoint({"step": 1}, path)

    def child() -> None:
        def die(*_: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if point == "while writing":
            write._torch_save = lambda content, target: (target.write_bytes(b"PK half"), die())
        elif point == "before fsync":
            atomic.sync = die
        elif point == "before rename":
            os.replace = die
        else:
            sync = atomic.sync
            atomic.sync = lambda target: die() if target.is_dir() else sync(target)
        write_checkpoint({"step": 2}, path)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert AtomicCheckpointIO().load_checkpoint(path)["step"] == step
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"], (
        "the next start sweeps what the killed one left"
    )


def test_every_format_has_the_permissions_of_a_new_file(tmp_path):
    (tmp_path / "new").touch()
    for name in ("a.ckpt", "a.safetensors"):
        write.write_weights({"x": torch.ones(1)}, tmp_path / name)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
