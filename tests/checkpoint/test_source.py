"""Every kind of weights path gives the same model, and knows its files, size, fingerprint and step."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from ldm.checkpoint import (
    CheckpointError,
    MissingWeightsError,
    load_weights,
    open_weights,
    read_step,
    read_weights,
    write_checkpoint,
    write_weights,
)
from ldm.config.model_info import read_config
from ldm.convert.convert import to_folder
from ldm.inference import load_model
from ldm.util import instantiate_from_config
from tests.checkpoint.models import Model, same, save
from tests.tiny import SavedModel, save_text_model

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> SavedModel:
    return save_text_model(tmp_path_factory.mktemp("kinds"))


def zip_ckpt(folder: Path, weights: Weights) -> Path:
    torch.save({"state_dict": weights, "global_step": 3}, folder / "a.ckpt")
    return folder / "a.ckpt"


def legacy_ckpt(folder: Path, weights: Weights) -> Path:
    torch.save({"state_dict": weights}, folder / "a.ckpt", _use_new_zipfile_serialization=False)
    return folder / "a.ckpt"


def bare_state_dict(folder: Path, weights: Weights) -> Path:
    torch.save(weights, folder / "a.pth")
    return folder / "a.pth"


def safetensors(folder: Path, weights: Weights) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "a.safetensors")
    return folder / "a.safetensors"


def shards(folder: Path, weights: Weights) -> Path:
    names, index = list(weights), folder / "model.safetensors.index.json"
    files = {f"model-0000{k + 1}-of-00003.safetensors": names[k::3] for k in range(3)}
    for file, part in files.items():
        save_file({name: weights[name].contiguous() for name in part}, folder / file)
    index.write_text(json.dumps({"weight_map": {name: file for file, part in files.items() for name in part}}))
    return index


def lightning_checkpoint(folder: Path, weights: Weights) -> Path:
    extra = {
        "epoch": 1,
        "global_step": 9,
        "pytorch-lightning_version": "2.6.6",
        "loops": {},
        "optimizer_states": [{"state": {}}],
    }
    write_checkpoint({"state_dict": weights, **extra}, folder / "last.ckpt")
    return folder / "last.ckpt"


KINDS = [zip_ckpt, legacy_ckpt, bare_state_dict, safetensors, shards, lightning_checkpoint]


def network_of(model: torch.nn.Module) -> Weights:
    return dict(model.model.diffusion_model.state_dict())


def averages_of(saved: SavedModel) -> Weights:
    with saved.model.ema_scope():
        return {name: tensor.clone() for name, tensor in network_of(saved.model).items()}


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
def test_a_file_of_any_kind_gives_its_weights_or_its_averages(saved, tmp_path, write):
    weights = saved.model.state_dict()
    source = open_weights(write(tmp_path, weights))
    assert same(source.tensors(), dict(weights))
    averaged, prefix = read_weights(source, use_ema=True), "model.diffusion_model."
    assert same({n.removeprefix(prefix): t for n, t in averaged.items() if n.startswith(prefix)}, averages_of(saved))
    others = {name: t for name, t in weights.items() if not name.startswith(("model_ema.", "model."))}
    assert same({name: averaged[name] for name in others}, others) and len(averaged) < len(weights)
    assert source.size > sum(tensor.nbytes for tensor in weights.values())
    assert source.step() == {zip_ckpt: 3, lightning_checkpoint: 9}.get(write)


@pytest.mark.parametrize("use_ema", [True, False])
def test_a_pipeline_has_the_averages_or_the_trained_weights(saved, use_ema):
    pipeline = load_model(saved.config, saved.ckpt, "cpu", "full", use_ema=use_ema)
    assert same(network_of(pipeline.model), averages_of(saved) if use_ema else network_of(saved.model))
    assert same(pipeline.model.first_stage_model.state_dict(), saved.model.first_stage_model.state_dict())


@pytest.mark.parametrize("write", [zip_ckpt, safetensors], ids=lambda write: write.__name__)
def test_a_file_of_averages_alone_gives_them_if_asked_for(saved, tmp_path, write):
    """The network is in `model_ema.*` under names without dots, which only the model can tell apart."""
    path = write(tmp_path, {name: t for name, t in saved.model.state_dict().items() if not name.startswith("model.")})
    pipeline = load_model(saved.config, path, "cpu", "full", use_ema=True)
    assert same(network_of(pipeline.model), averages_of(saved))
    with pytest.raises(CheckpointError, match="model"):
        load_model(saved.config, path, "cpu", "full", use_ema=False)


def test_averages_and_nothing_else_load_into_the_part_that_they_are_of(saved, tmp_path):
    weights = {name: t for name, t in saved.model.state_dict().items() if name.startswith("model_ema.")}
    path = zip_ckpt(tmp_path, weights)
    model = instantiate_from_config(OmegaConf.load(saved.config).model)
    load_weights(model, path, only="model.", use_ema=True)
    with saved.model.ema_scope():
        assert same(network_of(model), network_of(saved.model))
    with pytest.raises(CheckpointError, match=r"only EMA weights .*--use_ema"):
        load_weights(model.first_stage_model, path)
    with pytest.raises(CheckpointError, match="only EMA weights"):
        read_weights(path, use_ema=True)


@pytest.mark.parametrize("use_ema", [True, False])
def test_a_diffusers_folder_gives_the_weights_that_it_was_made_from(saved, tmp_path, use_ema, caplog):
    to_folder(read_config(saved.config), saved.ckpt, tmp_path / "folder", use_ema=use_ema)
    pipeline = load_model(saved.config, tmp_path / "folder", "cpu", "full")
    assert "no EMA weights" not in caplog.text
    assert same(network_of(pipeline.model), averages_of(saved) if use_ema else network_of(saved.model))
    assert same(pipeline.model.cond_stage_model.state_dict(), saved.model.cond_stage_model.state_dict())


def test_a_fingerprint_changes_with_any_file_of_the_weights(saved, tmp_path):
    to_folder(read_config(saved.config), saved.ckpt, tmp_path / "folder")
    (tmp_path / "shards").mkdir()
    index = shards(tmp_path / "shards", saved.model.state_dict())
    for source, file in (
        (open_weights(tmp_path / "folder"), tmp_path / "folder" / "unet" / "config.json"),
        (open_weights(index), tmp_path / "shards" / "model-00003-of-00003.safetensors"),
    ):
        assert file in source.files and source.size == sum(path.stat().st_size for path in source.files)
        before = source.fingerprint
        assert open_weights(source.path).fingerprint == before and len(before) == 16
        file.write_bytes(file.read_bytes() + b" ")
        assert open_weights(source.path).fingerprint != before


def test_a_path_without_weights_is_an_error(tmp_path):
    with pytest.raises(MissingWeightsError, match="no such file"):
        open_weights(tmp_path / "nothing.ckpt")
    with pytest.raises(CheckpointError, match="not a model in diffusers' layout"):
        open_weights(tmp_path)


def test_the_step_of_a_checkpoint_is_read_without_its_weights(tmp_path):
    assert read_step(save(tmp_path / "a.ckpt", Model().state_dict(), global_step=7)) == 7
    torch.save(Model().state_dict(), tmp_path / "b.ckpt")
    assert read_step(tmp_path / "b.ckpt") is None
    write_weights(Model().state_dict(), tmp_path / "c.safetensors")
    assert read_step(tmp_path / "c.safetensors") is None


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "shards must be in the folder of their index"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "shards must be in the folder of their index"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "no such file"),
        ('{"weight_map": {"a": 3}}', "not an index of shards"),
        ('{"weight_map": []}', "not an index of shards"),
        ("[" * 100_000, "not an index of shards"),
        ("{}", "not an index of shards"),
    ],
)
def test_a_bad_index_is_refused_in_one_line(tmp_path, index, says):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_weights(tmp_path / "model.safetensors.index.json")
    assert "\n" not in str(caught.value)
