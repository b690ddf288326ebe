"""Weights are data: no file runs code through any entry point, errors name that code, and genuine old files load."""

import collections
import contextlib
import json
import shutil
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.checkpoint import (
    CheckpointError,
    UnsafeCheckpointError,
    load_weights,
    read_checkpoint,
    read_step,
    read_weights,
    verify_checkpoint,
)
from ldm.checkpoint.diffusers.files import read_component
from ldm.checkpoint.resume import find_checkpoint
from ldm.cli import run_command
from ldm.config.text_shapes import VIT_L_14
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, FrozenCLIPTextEmbedder
from ldm.modules.losses.lpips import LPIPS
from ldm.modules.quantize import VectorQuantizer2
from ldm.output.safety_checker import load_all_weights
from ldm.retrieval.database import Database
from ldm.retrieval.searcher import Searcher
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.util import instantiate_from_config
from scripts import convert, sample_diffusion, txt2img
from tests.hostile.weights import FILES, call, name, rename_in_pickle, system, unsafely, weights_and, zipped
from tests.modules.encoders.test_open_clip import TINY_JOINT as TINY_CLIP
from tests.tiny import FIRST_STAGE, text_model_config

READERS = {
    "read_weights": read_weights,
    "load_weights": lambda path: load_weights(nn.Linear(2, 2), path),
    "read_checkpoint": read_checkpoint,
    "verify_checkpoint": verify_checkpoint,
    "AtomicCheckpointIO": AtomicCheckpointIO().load_checkpoint,
    "read_step": read_step,  # looks into zip files alone
}
GIVE_TENSORS = ("read_weights", "load_weights")


def hostile(which, folder):
    path, canary = folder / f"model{FILES[which].suffix}", folder / "canary"
    FILES[which].write(path, canary)
    return path, canary


def test_there_are_at_least_forty_live_files():
    assert len(FILES) >= 40 and sum(file.live for file in FILES.values()) >= 40


@pytest.mark.parametrize("which", FILES)
def test_a_hostile_file_runs_nothing_and_is_refused_by_name(which, tmp_path):
    path, canary = hostile(which, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for reader, read in READERS.items():
        try:
            read(path)
        except UnsafeCheckpointError as error:
            assert error.refused == FILES[which].refused and error.refused in str(error), reader
        except CheckpointError as error:
            assert FILES[which].refused is None and str(path) in str(error) and "\n" not in str(error), (reader, error)
        else:
            assert reader not in GIVE_TENSORS and (FILES[which].refused is None or reader == "read_step"), reader
    assert sorted(tmp_path.rglob("*")) == before
    if FILES[which].live:  # it would have run, had it been read as torch reads what it trusts
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            unsafely(path)
        assert canary.exists()


# ---------------------------------------------------------------------------------------------------------- other doors


def script(path, folder):
    OmegaConf.save(OmegaConf.create(text_model_config()), folder / "config.yaml")
    argv = [
        "--config",
        str(folder / "config.yaml"),
        "--ckpt",
        str(path),
        "--H",
        "16",
        "--W",
        "16",
        "--ddim_steps",
        "1",
        "--device",
        "cpu",
    ]
    code = run_command(txt2img.main, [*argv, "--outdir", str(folder / "out")])
    raise CheckpointError(f"exit code {code}")


def resumed_script(path, folder):
    run_folder = folder / "logs" / "run"
    (run_folder / "checkpoints").mkdir(parents=True)
    OmegaConf.save(
        OmegaConf.create(text_model_config(cond_stage_config="__is_unconditional__")), run_folder / "config.yaml"
    )
    shutil.copy(path, run_folder / "model.ckpt")
    argv = ["-r", str(run_folder), "-n", "1", "-c", "1", "--device", "cpu"]
    raise CheckpointError(f"exit code {run_command(sample_diffusion.main, argv)}")


def config(path, folder):
    params = {**FIRST_STAGE["params"], "ckpt_path": str(path)}
    instantiate_from_config({"model": {"target": FIRST_STAGE["target"], "params": params}}["model"])


def config_of_a_first_stage(path, folder):
    stage = {**FIRST_STAGE, "params": {**FIRST_STAGE["params"], "ckpt_path": str(path)}}
    instantiate_from_config(text_model_config(first_stage_config=stage)["model"])


def resumed_run(path, folder):
    (folder / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(path, folder / "run" / "checkpoints" / "last.ckpt")
    find_checkpoint(folder / "run")


def lpips(path, folder):
    with torch.device("meta"):
        lpips = LPIPS(path)
    lpips.load_pretrained()


def clip_folder(path, folder):
    (folder / "clip").mkdir()
    shutil.copy(path, folder / "clip" / "pytorch_model.bin")
    shape = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    (folder / "clip" / "config.json").write_text(json.dumps({**VIT_L_14, **shape}))
    FrozenCLIPEmbedder(version=str(folder / "clip")).load_pretrained()


def clip_file(path, folder):
    with torch.device("meta"):
        clip = FrozenCLIPTextEmbedder(clip_config=TINY_CLIP, weights=str(path))
    clip.ensure_weights()


def shards(path, folder):
    shutil.copy(path, folder / "shard.bin")
    (folder / "x.index.json").write_text(json.dumps({"weight_map": {"w": "shard.bin"}}))
    read_weights(folder / "x.index.json")


def diffusers_component(path, folder):
    shutil.copy(path, folder / "diffusion_pytorch_model.bin")
    read_component(folder)


def conversion(path, folder):
    OmegaConf.save(OmegaConf.create(text_model_config()), folder / "config.yaml")
    code = run_command(
        convert.main, ["--config", str(folder / "config.yaml"), "--ckpt", str(path), "--out", str(folder / "out")]
    )
    assert code == 2 and not (folder / "out").exists()
    raise CheckpointError("exit code 2")


def safety_checker(path, folder):
    load_all_weights(nn.Linear(2, 2), path)


DOORS = (shards, diffusers_component, conversion, safety_checker)
DOORS += (script, resumed_script, config, config_of_a_first_stage, resumed_run, lpips, clip_folder, clip_file)
SOME = ("posix.system", "torch's storage", "STACK_GLOBAL", "legacy, last pickle", "a bare pickle", "tar", "TorchScript")


@pytest.mark.parametrize("door", DOORS)
def test_no_entry_point_runs_code(door, tmp_path, capfd):
    for number, which in enumerate(SOME):
        folder = tmp_path / str(number)
        folder.mkdir()
        path, canary = hostile(which, folder)
        with pytest.raises(CheckpointError) as caught:
            door(path, folder)
        assert not canary.exists()
        said = capfd.readouterr().err + str(caught.value)
        assert (FILES[which].refused or str(folder)) in said and "Traceback" not in said
        if door in (script, resumed_script):
            assert "exit code 2" in said and not list(folder.rglob("*.png"))


# --------------------------------------------------------------------------------------------------- stubs, lying sizes


@pytest.mark.parametrize(
    "gadget",
    [
        call("numpy.dtype", name("numpy.dtype"), b"\x89", b"\x88")
        + b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
        call("numpy.dtype", b"]") + b"}b",
        call("numpy.core.multiarray.scalar", call("numpy.dtype", b"X\x02\x00\x00\x00O8"), b"X\x03\x00\x00\x00abc"),
        call("numpy._core.multiarray.scalar", name("numpy.core.multiarray.scalar"), b"N"),
        name("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
        + b")\x81}X\x09\x00\x00\x00__class__"
        + name("numpy.dtype")
        + b"sb",
        name("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
        + b")\x81}X\x0a\x00\x00\x00__reduce__"
        + name("numpy.dtype")
        + b"sb",
        call("torch._tensor._rebuild_from_type_v2", name("numpy.dtype"), name("torch.Tensor"), b")", b"}"),
    ],
)
def test_the_stubs_do_nothing_whatever_their_arguments(gadget, tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(zipped(weights_and(gadget)))
    with contextlib.suppress(CheckpointError):
        extra = read_checkpoint(path)["extra"]
        assert type(extra).__module__ in ("builtins", "ldm.checkpoint.formats")


def test_false_sizes_allocate_nothing(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"w": torch.zeros(77)}, path, _use_new_zipfile_serialization=False)
    body = path.read_bytes()
    assert body.count(b"K\x4d") >= 2  # 77, in a storage's identity and in the shape
    path.write_bytes(body.replace(b"K\x4d", b"\x8a\x07" + (2**50).to_bytes(7, "little")))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(path)


# --------------------------------------------------------------------------------------------------------- numpy, faiss


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return eval, (f"open({str(self.canary)!r}, 'w')",)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_objects_in_a_database_are_never_unpickled(save, tmp_path):
    objects = np.array([Payload(tmp_path / "canary")], dtype=object)
    save(tmp_path / "part.npz", embedding=objects)
    with pytest.raises(ValueError, match=r"part\.npz: embedding: "):
        Database(tmp_path)
    save(tmp_path / "part.npz", embedding=np.ones((2, 3), np.float32), img_id=objects)
    assert Database(tmp_path).img_id(np.array([1])) == [1]
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "shape",
    ["(1099511627776, 1099511627776)", "(-1, 3)", "(4611686018427387904, 4)", "(9, 3)", "[2, 3]", "__import__('os')"],
)
def test_a_database_with_a_false_shape_is_refused(shape, tmp_path):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    body = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(24)
    with zipfile.ZipFile(tmp_path / "part.npz", "w") as archive:
        archive.writestr("embedding.npy", body)
    with pytest.raises(ValueError, match=r"part\.npz: "):
        Database(tmp_path)


def test_a_codebook_map_is_never_unpickled(tmp_path):
    for number, objects in enumerate((np.array([Payload(tmp_path / "canary")], dtype=object), None)):
        path = tmp_path / f"{number}.npy"
        np.save(path, objects, allow_pickle=True) if objects is not None else path.write_bytes(
            b"\x80\x02" + system(tmp_path / "canary") + b"."
        )
        with pytest.raises(ValueError, match=str(path)):
            VectorQuantizer2(4, 2, 0.25, remap=path)
    assert not (tmp_path / "canary").exists()


def searcher(folder):
    pytest.importorskip("faiss")
    npz(folder / "part.npz", embedding=np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32))
    made = Searcher.train(Database(folder), knn=2)
    made.save(folder / "searcher")
    return made, folder / "searcher" / "index.faiss"


@pytest.mark.parametrize("cut", [0, 3, 20, -1])
def test_a_damaged_index_is_refused(cut, tmp_path):
    made, file = searcher(tmp_path)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match="train_searcher"):
        Searcher.load(made.database, file.parent)


def test_an_index_of_other_vectors_or_of_another_kind_is_refused(tmp_path):
    made, file = searcher(tmp_path)
    import faiss

    vectors = np.ones((30, 4), np.float32)
    outside = faiss.index_factory(4, "IVF2,Flat")
    outside.train(vectors)
    lists = faiss.OnDiskInvertedLists(2, outside.code_size, str(tmp_path / "elsewhere"))
    outside.replace_invlists(lists, False)
    outside.add(vectors[:9])
    more, wide, named = faiss.IndexFlatIP(4), faiss.IndexFlatIP(5), faiss.index_factory(4, "IDMap,Flat")
    more.add(vectors)
    wide.add(np.ones((9, 5), np.float32))
    named.add_with_ids(vectors[:9], np.arange(9) + 10**6)
    for index in (more, wide, named, outside):
        faiss.write_index(index, str(file))
        with pytest.raises(ValueError, match="train_searcher"):
            Searcher.load(made.database, file.parent)


# ------------------------------------------------------------------------------------------------------------ old files

WEIGHTS = {"model.diffusion_model.out.2.weight": torch.arange(6.0).reshape(2, 3), "betas": torch.linspace(0.1, 0.2, 4)}
LIGHTNING = {
    "epoch": 12,
    "global_step": 470000,
    "pytorch-lightning_version": "1.4.2",
    "state_dict": collections.OrderedDict(WEIGHTS),
}
RATES = [
    {
        "_last_lr": [np.float64(1e-4)],
        "last_epoch": np.int64(3),
        "base_lrs": [np.float32(0.5)],
        "verbose": np.bool_(False),
    }
]
ADAM = {
    "state": {0: {"step": 5, "exp_avg": torch.ones(2)}},
    "param_groups": [{"lr": np.float64(1e-4), "betas": (0.9, 0.999), "params": [0]}],
}


def genuine(kind):
    from pytorch_lightning.callbacks.model_checkpoint import ModelCheckpoint

    kept = {
        "monitor": "val/loss_simple_ema",
        "best_model_score": torch.tensor(0.1),
        "best_model_path": "logs/a.ckpt",
        "dirpath": "logs",
    }
    return {
        "stable diffusion": {
            **LIGHTNING,
            "callbacks": {ModelCheckpoint: kept},
            "lr_schedulers": RATES,
            "optimizer_states": [ADAM],
        },
        "first stage with two optimizers": {
            **LIGHTNING,
            "callbacks": {ModelCheckpoint: kept},
            "optimizer_states": [ADAM, ADAM],
            "lr_schedulers": [],
        },
        "scores in numpy": {
            **LIGHTNING,
            "callbacks": {ModelCheckpoint: {**kept, "best_model_score": np.float32(0.1), "step": np.int64(7)}},
        },
        "weights alone": {"state_dict": WEIGHTS, "global_step": np.int64(3)},
        "bare": WEIGHTS,
    }[kind]


@pytest.mark.parametrize("zipped_as_now", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("numpy_package", [b"numpy._core", b"numpy.core"], ids=["numpy 2", "numpy 1"])
@pytest.mark.parametrize(
    "kind", ["stable diffusion", "first stage with two optimizers", "scores in numpy", "weights alone", "bare"]
)
def test_genuine_old_files_load(kind, zipped_as_now, numpy_package, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save(genuine(kind), path, _use_new_zipfile_serialization=zipped_as_now)
    rename_in_pickle(path, b"numpy._core.multiarray", numpy_package + b".multiarray")
    found = read_weights(path)
    assert found.keys() == WEIGHTS.keys() and all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)
