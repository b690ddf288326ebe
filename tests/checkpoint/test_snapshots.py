"""Files of snapshots of averages."""

import pytest
import torch

from ldm.checkpoint.formats import CheckpointError
from ldm.checkpoint.snapshots import Profile, Snapshot, find_snapshots, snapshot_interval, write_snapshot
from ldm.checkpoint.write import write_weights


def test_the_snapshots_of_a_step_are_at_most_the_limit_and_evenly_spaced():
    for every, limit in ((1, 1), (1, 5), (10, 4), (7, 3)):
        for step in range(1, 300):
            interval = snapshot_interval(step, every, limit)
            kept = range(interval, step + 1, interval)
            assert len(kept) <= limit and interval % every == 0
            assert interval == every or step // (interval // 2) > limit  # no interval shorter would do
            assert snapshot_interval(step + 1, every, limit) % interval == 0  # what is kept later is kept now


def test_snapshots_hold_16_bit_averages_with_their_width_and_time(tmp_path):
    weights = {"aweight": torch.tensor([0.1, 2.0]), "bweight": torch.tensor([1e6])}
    path = write_snapshot(tmp_path / "ema", 40, {"sigma_rel_0_1": weights}, {"sigma_rel_0_1": Profile(0.1, 39)})
    (snapshot,) = find_snapshots(tmp_path / "ema")
    assert snapshot == Snapshot(path, 40) and snapshot.profiles() == {"sigma_rel_0_1": Profile(0.1, 39)}
    tensors = snapshot.tensors()
    assert torch.equal(tensors["sigma_rel_0_1.aweight"], weights["aweight"].half())
    assert torch.equal(tensors["sigma_rel_0_1.bweight"], weights["bweight"])  # beyond the range of float16


def test_another_file_in_the_folder_is_named(tmp_path):
    write_weights({"a": torch.ones(1)}, tmp_path / "step=000000001.safetensors")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"step=000000001.safetensors: not a snapshot"):
        find_snapshots(tmp_path)[0].profiles()
    assert find_snapshots(tmp_path / "missing") == []
