"""Checkpoints of training runs: Lightning reads and writes them safely; a run resumes from a usable one."""

import logging
import os
from pathlib import Path

import pytest

from ldm.checkpoint import CheckpointError, write_checkpoint
from ldm.checkpoint.formats import PARTS
from ldm.checkpoint.resume import find_checkpoint, remove_unused_parts
from ldm.training.checkpoint_io import AtomicCheckpointIO
from tests.checkpoint.models import SPLIT, WEIGHTS, same, save, save_split


def test_the_unsafe_loader_cannot_be_asked_for(tmp_path):
    with pytest.raises(CheckpointError, match="weights_only=False"):
        AtomicCheckpointIO().load_checkpoint(save(tmp_path / "a.ckpt", WEIGHTS), weights_only=False)


def test_lightning_saves_loads_and_removes_through_it(tmp_path):
    io = AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": dict(WEIGHTS), "global_step": 5}, tmp_path / "new" / "last.ckpt")
    loaded = io.load_checkpoint(tmp_path / "new" / "last.ckpt", weights_only=True)
    assert same(loaded["state_dict"], WEIGHTS) and loaded["global_step"] == 5
    io.remove_checkpoint(tmp_path / "new" / "last.ckpt")
    assert not (tmp_path / "new" / "last.ckpt").exists()


def run_folder(path: Path, steps: dict[str, int]) -> Path:
    for age, (name, step) in enumerate(steps.items()):
        write_checkpoint({"global_step": step}, path / "checkpoints" / name)
        os.utime(path / "checkpoints" / name, (age, age))
    return path


def test_a_run_resumes_from_last(tmp_path):
    folder = run_folder(tmp_path, {"last.ckpt": 5, "epoch=000009.ckpt": 9, "crash.ckpt": 10})
    assert find_checkpoint(folder).name == "last.ckpt"
    assert find_checkpoint(folder / "checkpoints").name == "last.ckpt"


def test_a_damaged_last_gives_way_to_the_newest_whole_one_and_both_are_named(tmp_path, caplog):
    folder = run_folder(tmp_path, {"epoch=000001.ckpt": 1, "epoch=000002.ckpt": 2, "crash.ckpt": 3, "last.ckpt": 3})
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(folder).name == "epoch=000002.ckpt"
    assert "epoch=000002.ckpt" in caplog.text and "last.ckpt" in caplog.text


def test_the_newest_checkpoint_of_a_copied_run_is_the_one_saved_last(tmp_path):
    for name, step in (("epoch=000008.ckpt", 8), ("epoch=000004.ckpt", 4)):  # resumed from an earlier step
        AtomicCheckpointIO().save_checkpoint({"global_step": step}, tmp_path / "checkpoints" / name)
    for age, name in enumerate(("epoch=000004.ckpt", "epoch=000008.ckpt")):
        os.utime(tmp_path / "checkpoints" / name, (age, age))  # as after cp -r
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"PK damaged")
    assert find_checkpoint(tmp_path).name == "epoch=000004.ckpt"


def test_a_run_without_checkpoint_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(tmp_path / "nowhere")


def test_damaged_checkpoints_are_counted_and_one_is_named(tmp_path):
    folder = run_folder(tmp_path, {**{f"epoch=00000{n}.ckpt": n for n in range(6)}, "last.ckpt": 6})
    for path in (folder / "checkpoints").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        CheckpointError, match=r"none of 7 checkpoints is usable, first .*last\.ckpt: .*; restore one"
    ) as error:
        find_checkpoint(folder)
    assert len(str(error.value)) < 300 + 2 * len(str(folder))


def test_parts_live_as_long_as_an_index_names_them(tmp_path):
    folder = tmp_path / "checkpoints"
    for step, name in ((1, "epoch=000001.ckpt"), (2, "last-copy.ckpt"), (3, "last.ckpt")):
        save_split(folder / name, 2, {**SPLIT, "global_step": step}, str(step))
    for name in ("killed/.0-of-2.ckpt.tmp", "wheel/mine.txt"):
        (folder / PARTS / name).parent.mkdir()
        (folder / PARTS / name).touch()

    def parts():
        return sorted(each.name for each in (folder / PARTS).iterdir())

    AtomicCheckpointIO().remove_checkpoint(folder / "epoch=000001.ckpt")
    assert parts() == ["2", "3", "wheel"]  # what is not ours stays
    (folder / PARTS / "3" / "0.ckpt").unlink()
    remove_unused_parts(folder)  # an index without one of its parts
    assert parts() == ["2", "3", "wheel"]
    assert find_checkpoint(tmp_path, full_state=True).name == "last-copy.ckpt"


def test_an_index_that_cannot_be_read_keeps_only_parts_that_may_be_its_own(tmp_path):
    save_split(damaged := tmp_path / "last.ckpt", 2, SPLIT, "1")
    damaged.write_bytes(damaged.read_bytes()[:-100])
    for index, replaced in ((tmp_path / "a.ckpt", "2"), (tmp_path / "a.ckpt", "3")):
        save_split(index, 2, SPLIT, replaced)
        os.utime(tmp_path / PARTS / replaced, (damaged.stat().st_mtime + 60,) * 2)
    remove_unused_parts(tmp_path)
    assert sorted(each.name for each in (tmp_path / PARTS).iterdir()) == ["1", "3"]


def test_parts_behind_a_link_are_not_deleted(tmp_path):
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    (elsewhere / "1").mkdir(parents=True)
    (elsewhere / "1" / "0-of-1.ckpt").touch()
    folder.mkdir()
    (folder / PARTS).symlink_to(elsewhere)
    remove_unused_parts(folder)
    assert (elsewhere / "1" / "0-of-1.ckpt").exists()
