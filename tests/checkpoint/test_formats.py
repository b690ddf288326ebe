"""Reading of weights files: every format gives the same tensors, and what cannot be read is one clear line."""

import collections
import contextlib
import zipfile

import numpy as np
import pytest
import torch

from ldm.checkpoint import (
    CheckpointError,
    formats,
    read_checkpoint,
    read_weights,
    verify_checkpoint,
    write_checkpoint,
    write_weights,
)
from ldm.checkpoint.formats import PARTS
from tests.checkpoint.models import SPLIT, WEIGHTS, same, save, save_split
from tests.hostile.weights import rename_in_pickle
from tests.reference import randn


def test_ckpt_to_safetensors_to_ckpt_is_bitwise(tmp_path):
    write_weights(WEIGHTS, tmp_path / "a.ckpt")
    write_weights(read_weights(tmp_path / "a.ckpt"), tmp_path / "b.safetensors", metadata={"from": "a"})
    write_weights(read_weights(tmp_path / "b.safetensors"), tmp_path / "c.ckpt")
    assert same(read_weights(tmp_path / "b.safetensors"), WEIGHTS)
    assert same(read_weights(tmp_path / "c.ckpt"), WEIGHTS)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("bare", [True, False], ids=["bare", "inside"])
def test_every_torch_format_loads_whatever_the_suffix(tmp_path, zipped, bare):
    path = tmp_path / "weights.safetensors"
    torch.save(WEIGHTS if bare else {"state_dict": WEIGHTS, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    assert same(read_weights(path), WEIGHTS)


def test_entries_are_read_once_for_each_version_of_a_file(tmp_path, monkeypatch):
    path, read, load = tmp_path / "a.ckpt", [], formats.load_pickle
    for step in (1, 2):
        write_checkpoint({"state_dict": WEIGHTS, "global_step": step, "saved_at": 3.0}, path)
        monkeypatch.setattr(formats, "load_pickle", lambda *args, **kwargs: read.append(step) or load(*args, **kwargs))  # noqa: B023
        assert formats.global_step(path) == step and formats.saved_at(path) == 3.0 and formats.part_files(path) == []
        monkeypatch.undo()
    assert read == [1, 2]


def test_safetensors_holds_tensors_that_share_memory_or_are_strided(tmp_path):
    base = randn(1, 4, 6)
    weights = {"all": base, "again": base, "rows": base[1:3], "turned": base.t()}
    write_weights(weights, tmp_path / "a.safetensors")
    assert same(read_weights(tmp_path / "a.safetensors"), weights)


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_changing_mapped_weights_never_changes_the_file(tmp_path, name):
    path = tmp_path / name
    write_weights(WEIGHTS, path)
    before = path.read_bytes()
    read_weights(path)["a.weight"].fill_(9)
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", [0, 1, 30, 0.3, 0.6, 0.95, -1], ids=str)
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_one_clear_line_that_names_it(tmp_path, kind, cut):
    whole = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.ckpt")
    if kind == "safetensors":
        write_weights(WEIGHTS, whole)
    else:
        torch.save({"state_dict": WEIGHTS}, whole, _use_new_zipfile_serialization=kind == "zip")
    data = whole.read_bytes()
    length = int(cut * len(data)) if isinstance(cut, float) else cut if cut >= 0 else len(data) + cut
    whole.write_bytes(data[:length])
    with pytest.raises(CheckpointError) as caught:
        read_weights(whole)
    assert str(whole) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "neither"),
    ],
)
def test_an_error_says_what_the_file_is_instead_of_weights(tmp_path, content, says):
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_weights(tmp_path / "model.ckpt")


def test_an_archive_around_a_checkpoint_asks_to_unpack_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "kl-f8.ckpt", "w") as archive:
        archive.write(save(tmp_path / "model.ckpt", WEIGHTS), "kl-f8/model.ckpt")
    with pytest.raises(CheckpointError, match="unpack it"):
        read_weights(tmp_path / "kl-f8.ckpt")


def test_missing_files_folders_and_files_without_tensors_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_weights(tmp_path / "nothing.ckpt")
    with pytest.raises(CheckpointError, match="not a model in diffusers' layout"):
        read_weights(tmp_path)
    torch.save({"epoch": 1}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="no tensors; its entries are epoch"):
        read_weights(tmp_path / "a.ckpt")


def test_a_flipped_bit_in_a_weight_is_detected(tmp_path):
    path = tmp_path / "last.ckpt"
    weight = torch.full((1000,), 3.14159)
    write_checkpoint({"w": weight}, path)
    data = bytearray(path.read_bytes())
    data[data.find(weight.numpy().tobytes()) + 1234] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        read_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("numpy_package", ["numpy._core", "numpy.core"])
def test_a_checkpoint_of_an_old_lightning_loads(tmp_path, zipped, numpy_package):
    """They hold the class ModelCheckpoint as a key, and numpy scalars."""
    from pytorch_lightning.callbacks.model_checkpoint import ModelCheckpoint

    path, allowed = tmp_path / "model.ckpt", set(torch.serialization.get_safe_globals())
    content = {
        "epoch": 12,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": collections.OrderedDict(WEIGHTS),
        "callbacks": {
            ModelCheckpoint: {"monitor": "val/loss", "best_model_score": torch.tensor(0.1), "dirpath": "logs"}
        },
        "lr_schedulers": [
            {"_last_lr": [np.float64(1e-4)], "n": np.int64(3), "f": np.float32(0.5), "yes": np.bool_(True)}
        ],
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    if numpy_package == "numpy.core":  # as numpy 1 wrote it
        rename_in_pickle(path, b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert same(read_weights(path), WEIGHTS)
    numbers = read_checkpoint(path, verify=False)["lr_schedulers"][0]
    assert numbers == {"_last_lr": [1e-4], "n": 3, "f": 0.5, "yes": True}
    assert not any("numpy" in type(value).__module__ for value in (numbers["n"], numbers["_last_lr"][0]))
    assert set(torch.serialization.get_safe_globals()) == allowed, "the stubs are in force for one reading only"


def test_any_flipped_bit_at_the_end_of_a_zip_file_is_a_checkpoint_error(tmp_path):
    """The directory of the archive too, which zipfile reads by itself."""
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(3)}}, path)
    content = path.read_bytes()
    for offset in range(len(content) - 120, len(content)):
        damaged = bytearray(content)
        damaged[offset] ^= 1 << offset % 8
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):  # a bit without meaning is no damage
            verify_checkpoint(path)


# ------------------------------------------------------------------------------------------- sharded checkpoints


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])  # seven ranks: some have no row
def test_a_sharded_checkpoint_reads_as_a_whole_one(tmp_path, ranks):
    path = save_split(tmp_path / "last.ckpt", ranks)
    verify_checkpoint(path)
    read, expected = read_checkpoint(path), SPLIT["state_dict"]
    assert read.keys() == SPLIT.keys() and read["global_step"] == 7
    assert same(read["state_dict"], expected) and same(read_weights(path), expected)
    state = read["optimizer_states"][0]["state"][0]
    assert same(state, SPLIT["optimizer_states"][0]["state"][0])
    split = read_checkpoint(path, whole=False)["state_dict"]["weight"]
    for start, stop in ((0, 5), (0, 2), (1, 4), (3, 5), (4, 9), (5, 9)):
        assert torch.equal(split[start:stop], expected["weight"][start:stop])


@pytest.mark.parametrize("name", ["../x.ckpt", "/etc/x/x.ckpt", "parts/../x.ckpt", "parts/x.ckpt", 3])
def test_an_index_names_only_files_of_its_own_folder(tmp_path, name):
    write_checkpoint({"state_dict": {}, PARTS: [name]}, tmp_path / "x.ckpt")
    for use in (verify_checkpoint, read_checkpoint, read_weights):
        with pytest.raises(CheckpointError, match="invalid names of its parts"):
            use(tmp_path / "x.ckpt")


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "code", "rows", "other"])
def test_a_damaged_part_is_a_checkpoint_error(tmp_path, damage):
    path = save_split(tmp_path / "last.ckpt", 2)
    part = tmp_path / PARTS / "a" / "1.ckpt"
    content = part.read_bytes()
    if damage == "missing":
        part.unlink()
    elif damage == "cut":
        part.write_bytes(content[:-50])
    elif damage == "flipped":
        at = content.index(SPLIT["state_dict"]["weight"][4].numpy().tobytes())
        part.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif damage == "code":
        torch.save({"tensors": Unsafe()}, part)
    elif damage == "rows":
        write_checkpoint({"tensors": {}}, part)
    else:
        write_checkpoint({"tensors": [1]}, part)
    with pytest.raises(
        CheckpointError, match=r"1\.ckpt" if damage in ("missing", "cut", "flipped", "code") else "lack rows"
    ):
        verify_checkpoint(path)
        read_checkpoint(path)


class Unsafe:
    def __reduce__(self):
        return print, ("code ran",)
