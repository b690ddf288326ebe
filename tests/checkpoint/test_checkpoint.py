"""Laws of ldm.checkpoint.load: weights are data, names are the published ones, a report says what was done, a file is whole or not there."""

import collections
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ldm.checkpoint import (
    CheckpointError,
    CheckpointWriteError,
    UnsafeCheckpointError,
    load_weights,
    read_checkpoint,
    read_step,
    read_weights,
    sweep_temporaries,
    verify_checkpoint,
    write_checkpoint,
    write_weights,
)
from ldm.checkpoint import write as checkpoint_io
from ldm.checkpoint.resume import AtomicCheckpointIO, find_checkpoint
from tests.reference import randn

WEIGHTS = {
    "a.weight": randn(1, 4, 3),
    "a.bias": randn(2, 4),
    "half": randn(3, 5).half(),
    "count": torch.tensor(7),
    "none": torch.zeros(0, 2),
}


class Stage(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(2, width), nn.Linear(width, 2)


class Model(nn.Module):
    """A diffusion model's children, tiny."""

    def __init__(self, ema: bool = False, width: int = 3, shared: bool = False) -> None:
        super().__init__()
        self.register_buffer("betas", torch.linspace(0.1, 0.2, 4))
        self.model = nn.ModuleDict({"diffusion_model": Stage(width)})
        self.first_stage_model = Stage()
        self.cond_stage_model = self.first_stage_model if shared else nn.Linear(3, 3)
        if ema:
            self.model_ema = nn.Module()
            self.model_ema.register_buffer("decay", torch.tensor(0.9))
            self.model_ema.register_buffer("num_updates", torch.tensor(3))
            for name, parameter in self.model.named_parameters():
                self.model_ema.register_buffer(name.replace(".", ""), parameter.detach() + 1)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )


def save(path: Path, weights: dict, **extra: object) -> Path:
    torch.save({"state_dict": weights, **extra}, path)
    return path


# --------------------------------------------------------------------------------------------------------- formats


def test_ckpt_to_safetensors_to_ckpt_is_bitwise(tmp_path):
    write_weights(WEIGHTS, tmp_path / "a.ckpt")
    write_weights(read_weights(tmp_path / "a.ckpt"), tmp_path / "b.safetensors", metadata={"from": "a"})
    write_weights(read_weights(tmp_path / "b.safetensors"), tmp_path / "c.ckpt")
    assert same(read_weights(tmp_path / "b.safetensors"), WEIGHTS)
    assert same(read_weights(tmp_path / "c.ckpt"), WEIGHTS)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("bare", [True, False], ids=["bare", "inside"])
def test_every_torch_format_reads_whatever_its_ending(tmp_path, zipped, bare):
    path = tmp_path / "weights.safetensors"
    torch.save(WEIGHTS if bare else {"state_dict": WEIGHTS, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    assert same(read_weights(path), WEIGHTS)


def test_safetensors_takes_tensors_that_share_memory_or_are_strided(tmp_path):
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
def test_what_is_no_weights_file_is_called_by_its_name(tmp_path, content, says):
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_weights(tmp_path / "model.ckpt")


def test_an_archive_around_a_checkpoint_is_to_be_unpacked(tmp_path):
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


# --------------------------------------------------------------------------------------------------- hostile and old files


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: object, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return self.function, self.args


def hostile(kind: str, path: Path, canary: Path) -> str:
    """Write a file that creates `canary` when it is unpickled -> the name that the error must give."""
    command = f"touch {canary}"
    source = f"open({str(canary)!r}, 'w')"
    import builtins
    import functools
    import runpy
    import subprocess

    script = canary.with_suffix(".py")
    script.write_text(source)
    names = {
        "system": (Call(os.system, command), "posix.system"),
        "eval": (Call(builtins.eval, source), "builtins.eval"),
        "exec": (Call(builtins.exec, source), "builtins.exec"),
        "runpy": (Call(runpy.run_path, str(script)), "runpy.run_path"),
        "popen": (Call(subprocess.Popen, ["touch", str(canary)]), "subprocess.Popen"),
        "getattr": (Call(builtins.getattr, os, "system"), "builtins.getattr"),
        "partial": (functools.partial(os.system, command), "functools.partial"),
        "torch.load": (Call(torch.load, str(canary)), "torch.serialization.load"),
        "numpy array": (np.zeros(3), "numpy._core.multiarray._reconstruct"),
    }
    form, _, what = kind.partition(":")
    payload, refused = names[what]
    if isinstance(payload, Call) and what == "getattr":
        payload = Call(builtins.getattr, "text", "upper")
    content = {"state_dict": {"w": torch.ones(2)}, "extra": payload}
    if form == "zip":
        torch.save(content, path)
    elif form == "zip4":
        torch.save(content, path, pickle_protocol=4)
    elif form == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(payload))
    elif form == "text":
        path.write_bytes(pickle.dumps(payload, protocol=0))
    return refused


KINDS = [
    f"zip:{what}"
    for what in ("system", "eval", "exec", "runpy", "popen", "getattr", "partial", "torch.load", "numpy array")
]
KINDS += [
    "zip4:system",
    "zip4:eval",
    "legacy:system",
    "legacy:runpy",
    "pickle:system",
    "pickle:eval",
    "text:system",
    "text:exec",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_names_code_is_refused_by_name_and_runs_nothing(tmp_path, kind):
    path, canary = tmp_path / "model.ckpt", tmp_path / "canary"
    refused = hostile(kind, path, canary)
    for read in (read_weights, read_checkpoint, AtomicCheckpointIO().load_checkpoint, verify_checkpoint):
        with pytest.raises(UnsafeCheckpointError, match="refused") as caught:
            read(path)
        assert caught.value.refused == refused
    assert not canary.exists()


def test_an_old_tar_file_is_refused(tmp_path):
    path = tmp_path / "model.ckpt"
    (tmp_path / "pickle").write_bytes(pickle.dumps(Call(os.system, "false")))
    with tarfile.open(path, "w") as archive:
        archive.add(tmp_path / "pickle", "pickle")
    with pytest.raises(CheckpointError):
        read_weights(path)


def test_there_is_no_way_to_the_unsafe_loader(tmp_path):
    with pytest.raises(CheckpointError, match="weights_only=False"):
        AtomicCheckpointIO().load_checkpoint(save(tmp_path / "a.ckpt", WEIGHTS), weights_only=False)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("numpy_package", ["numpy._core", "numpy.core"])
def test_a_checkpoint_of_an_old_lightning_loads(tmp_path, zipped, numpy_package):
    """They hold the class ModelCheckpoint as a key and numpy's numbers beside the weights."""
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


def rename_in_pickle(path: Path, old: bytes, new: bytes) -> None:
    if not zipfile.is_zipfile(path):
        path.write_bytes(path.read_bytes().replace(old, new))
        return
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data.replace(old, new) if name.endswith(".pkl") else data)


# ------------------------------------------------------------------------------------------------------------ names


def test_names_of_other_versions_become_the_published_ones(tmp_path):
    clip = "cond_stage_model.transformer."
    file = {
        clip + "embeddings.token_embedding.weight": randn(1, 2),
        clip + "encoder.layers.0.mlp.fc1.weight": randn(2, 2),
        clip + "text_model.final_layer_norm.weight": randn(3, 2),
        clip + "text_model.embeddings.position_ids": torch.arange(77)[None].half(),
        "cond_stage_model.transformer.attn_layers.layers.0.0.weight": randn(4, 2),
        "model._orig_mod.diffusion_model.x": randn(5, 2),
        "model.diffusion_model._orig_mod.y": randn(6, 2),
    }
    names = list(read_weights(save(tmp_path / "a.ckpt", file)))
    assert names == [
        clip + "text_model.embeddings.token_embedding.weight",
        clip + "text_model.encoder.layers.0.mlp.fc1.weight",
        clip + "text_model.final_layer_norm.weight",
        "cond_stage_model.transformer.attn_layers.layers.0.0.weight",
        "model.diffusion_model.x",
        "model.diffusion_model.y",
    ]


def test_use_ema_puts_the_averages_in_the_place_of_the_weights(tmp_path):
    model = Model(ema=True)
    path = save(tmp_path / "full.ckpt", model.state_dict())
    chosen = read_weights(path, use_ema=True)
    assert not any(name.startswith("model_ema.") for name in chosen)
    for name, value in model.state_dict().items():
        if name.startswith("model."):
            assert torch.equal(chosen[name], value + 1)
        elif not name.startswith("model_ema."):
            assert torch.equal(chosen[name], value)


def test_use_ema_finds_the_averages_of_a_first_stage(tmp_path):
    stage = Stage()
    file = stage.state_dict() | {
        "model_ema." + name.replace(".", ""): value + 1 for name, value in stage.state_dict().items()
    }
    chosen = read_weights(save(tmp_path / "a.ckpt", file), use_ema=True)
    assert same(chosen, {name: value + 1 for name, value in stage.state_dict().items()})


def test_use_ema_without_averages_warns_and_takes_the_weights(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert same(read_weights(save(tmp_path / "a.ckpt", WEIGHTS), use_ema=True), WEIGHTS)
    assert "no EMA weights in the file" in caplog.text


def test_averages_start_from_the_loaded_weights_where_the_file_has_none(tmp_path):
    path = save(tmp_path / "a.ckpt", Model().state_dict())
    model = Model(ema=True)
    report = load_weights(model, path)
    assert report.ema_started
    for name, parameter in model.model.named_parameters():
        assert torch.equal(getattr(model.model_ema, name.replace(".", "")), parameter)


# ------------------------------------------------------------------------------------------------------- into a module


def test_loading_fills_the_module_and_says_so_in_one_line(tmp_path, caplog):
    source, target = Model(), Model()
    with caplog.at_level(logging.INFO, "ldm"):
        report = load_weights(target, save(tmp_path / "a.ckpt", source.state_dict() | {"extra.weight": torch.ones(1)}))
    assert same(target.state_dict(), source.state_dict())
    assert (report.loaded, report.missing, report.unexpected) == (len(source.state_dict()), (), ("extra.weight",))
    assert [record.getMessage() for record in caplog.records] == [str(report)]


def test_a_model_on_the_meta_device_takes_the_tensors_of_the_file_in_its_own_dtype(tmp_path):
    source = Model()
    path = save(tmp_path / "a.ckpt", {name: value.half() for name, value in source.state_dict().items()})
    with torch.device("meta"):
        target = Model()
    target.first_stage_model.requires_grad_(False)
    load_weights(target, path)
    for name, value in target.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, source.state_dict()[name].half().float())
    assert (
        target.model.diffusion_model.encoder.weight.requires_grad
        and not target.first_stage_model.encoder.weight.requires_grad
    )


def test_a_compiled_model_loads_and_its_file_has_plain_names(tmp_path):
    source, target = Model(), Model()
    target.model["diffusion_model"] = nn.ModuleDict(
        {"_orig_mod": target.model["diffusion_model"]}
    )  # as torch.compile(module) nests it
    assert load_weights(target, save(tmp_path / "a.ckpt", source.state_dict())).missing == ()
    assert same(read_weights(save(tmp_path / "b.ckpt", target.state_dict())), source.state_dict())


def test_nothing_that_fits_is_an_error_that_shows_both_sides(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weight matches Model: the file has a\.weight.*the model betas"):
        load_weights(Model(), save(tmp_path / "a.ckpt", {"a.weight": torch.ones(1)}))


def test_another_shape_is_an_error_that_names_it(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"model\.diffusion_model\.encoder\.weight: \(5, 2\), the model's \(3, 2\)"
    ):
        load_weights(Model(), save(tmp_path / "a.ckpt", Model(width=5).state_dict()))


@pytest.mark.parametrize("block", ["model", "first_stage_model", "first_stage_model.decoder", "cond_stage_model"])
def test_a_missing_block_is_an_error_unless_it_is_excused(tmp_path, block):
    path = save(
        tmp_path / "a.ckpt",
        {name: value for name, value in Model().state_dict().items() if not name.startswith(block + ".")},
    )
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"lacks all weights of {block}"):
        load_weights(model, path)
    assert same(model.state_dict(), before), "refused before anything was changed"
    assert load_weights(model, path, strict_blocks=False).missing
    assert not load_weights(model, path, ignore_keys=[block + "."]).missing


def test_a_single_missing_weight_is_reported_and_warned_about(tmp_path, caplog):
    weights = Model().state_dict()
    del weights["first_stage_model.decoder.bias"], weights["betas"]
    with caplog.at_level(logging.WARNING, "ldm"):
        report = load_weights(Model(), save(tmp_path / "a.ckpt", weights))
    assert report.missing == ("betas", "first_stage_model.decoder.bias") and "2 missing" in caplog.text


def test_a_block_with_weights_of_its_own_may_be_missing(tmp_path):
    own = save(tmp_path / "first_stage.ckpt", Stage().state_dict())
    main = save(
        tmp_path / "main.ckpt",
        {name: value for name, value in Model().state_dict().items() if name.startswith("model.")},
    )
    model = Model()
    model.cond_stage_model.finds_own_weights = True
    load_weights(model.first_stage_model, own)
    report = load_weights(model, main)
    assert set(report.excused) == {"first_stage_model", "cond_stage_model", "betas"}


def test_a_first_stage_that_is_also_the_condition_needs_its_weights_once(tmp_path):
    weights = {
        name: value
        for name, value in Model(shared=True).state_dict().items()
        if not name.startswith("cond_stage_model.")
    }
    assert load_weights(Model(shared=True), save(tmp_path / "a.ckpt", weights)).missing == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_schedule_in_half_precision_is_left_as_the_module_computed_it(tmp_path, dtype):
    """Rounded, the first alphas_cumprod are 1, which samplers divide by one minus of."""
    module = Model()
    module.num_timesteps = 5
    module.register_buffer("alphas_cumprod", torch.linspace(0.9999, 0.1, 5))
    module.register_buffer("scale_factor", torch.tensor(1.0))
    halves = {name: (2 * tensor).to(dtype) for name, tensor in module.state_dict().items()}
    report = load_weights(module, save(tmp_path / "half.ckpt", halves))
    assert torch.equal(module.alphas_cumprod, torch.linspace(0.9999, 0.1, 5)) and module.scale_factor == 2.0
    assert report.missing == report.unexpected == () and report.loaded == len(halves) - 1
    floats = {name: tensor.float() for name, tensor in halves.items()}  # a file in full precision is believed
    load_weights(module, save(tmp_path / "full.ckpt", floats))
    assert torch.equal(module.alphas_cumprod, floats["alphas_cumprod"])


def test_the_step_of_a_checkpoint_is_read_without_its_weights(tmp_path):
    assert read_step(save(tmp_path / "a.ckpt", Model().state_dict(), global_step=7)) == 7
    torch.save(Model().state_dict(), tmp_path / "b.ckpt")
    assert read_step(tmp_path / "b.ckpt") is None
    write_weights(Model().state_dict(), tmp_path / "c.safetensors")
    assert read_step(tmp_path / "c.safetensors") is None


def test_ignored_names_are_not_read(tmp_path):
    model = Model()
    before = model.first_stage_model.encoder.weight.clone()
    load_weights(model, save(tmp_path / "a.ckpt", Model().state_dict()), ignore_keys=["first_stage_model"])
    assert torch.equal(model.first_stage_model.encoder.weight, before)


@pytest.mark.parametrize("bare", [False, True], ids=["whole file", "file of the part"])
def test_only_touches_the_part_asked_for(tmp_path, bare):
    source, model = Model(), Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_weights(model, save(tmp_path / "a.ckpt", (source.model if bare else source).state_dict()), only="model.")
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name] if name.startswith("model.") else before[name])


# ------------------------------------------------------------------------------------------------------------ writing


def test_a_checkpoint_holds_plain_values_whatever_was_given(tmp_path):
    from omegaconf import OmegaConf

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
        monkeypatch.setattr(
            checkpoint_io, "_torch_save", lambda content, target: target.write_bytes(b"PK\x03\x04 half of it")
        )
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
            checkpoint_io._torch_save = lambda content, target: (target.write_bytes(b"PK half"), die())
        elif point == "before fsync":
            checkpoint_io.sync = die
        elif point == "before rename":
            os.replace = die
        else:
            sync = checkpoint_io.sync
            checkpoint_io.sync = lambda target: die() if target.is_dir() else sync(target)
        write_checkpoint({"step": 2}, path)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert AtomicCheckpointIO().load_checkpoint(path)["step"] == step
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"], (
        "the next start sweeps what the killed one left"
    )


def test_sweeping_spares_a_living_writer(tmp_path):
    (tmp_path / ".last.ckpt.abandoned.tmp").write_bytes(b"x")
    (tmp_path / "notes.tmp").write_bytes(b"x")
    with checkpoint_io.temporary_beside(tmp_path / "last.ckpt") as alive:
        assert sweep_temporaries(tmp_path) == 1
        assert alive.exists() and (tmp_path / "notes.tmp").exists()


def test_lightning_saves_and_loads_through_it(tmp_path):
    io = AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": dict(WEIGHTS), "global_step": 5}, tmp_path / "new" / "last.ckpt")
    loaded = io.load_checkpoint(tmp_path / "new" / "last.ckpt", weights_only=True)
    assert same(loaded["state_dict"], WEIGHTS) and loaded["global_step"] == 5
    io.remove_checkpoint(tmp_path / "new" / "last.ckpt")
    assert not (tmp_path / "new" / "last.ckpt").exists()


def test_a_flipped_bit_in_a_weight_is_detected(tmp_path):
    path = tmp_path / "last.ckpt"
    weight = torch.full((1000,), 3.14159)
    write_checkpoint({"w": weight}, path)
    data = bytearray(path.read_bytes())
    data[data.find(weight.numpy().tobytes()) + 1234] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        AtomicCheckpointIO().load_checkpoint(path)


# ------------------------------------------------------------------------------------------------------------ finding


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


def test_a_run_without_checkpoint_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(tmp_path / "nowhere")
