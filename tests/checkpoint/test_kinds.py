"""Every kind of weights file of one model gives the same model."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from ldm.checkpoint import CheckpointError, load_weights, read_weights, write_checkpoint
from ldm.convert.convert import to_folder
from ldm.inference import load_model
from ldm.inference.settings import read_config
from ldm.util import instantiate_from_config
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


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("use_ema", [True, False])
def test_a_full_file_of_any_kind_gives_its_averages_or_its_trained_weights(saved, tmp_path, write, use_ema):
    pipeline = load_model(saved.config, write(tmp_path, saved.model.state_dict()), "cpu", "full", use_ema=use_ema)
    with saved.model.ema_scope():
        averages = {name: tensor.clone() for name, tensor in network_of(saved.model).items()}
    assert same(network_of(pipeline.model), averages if use_ema else network_of(saved.model))
    assert same(pipeline.model.first_stage_model.state_dict(), saved.model.first_stage_model.state_dict())


@pytest.mark.parametrize("write", [zip_ckpt, safetensors], ids=lambda write: write.__name__)
def test_a_file_of_averages_alone_gives_them_where_asked_for(saved, tmp_path, write):
    """Its network is in `model_ema.*` under names without dots, which only the model can tell apart."""
    path = write(tmp_path, {name: t for name, t in saved.model.state_dict().items() if not name.startswith("model.")})
    pipeline = load_model(saved.config, path, "cpu", "full", use_ema=True)
    with saved.model.ema_scope():
        assert same(network_of(pipeline.model), network_of(saved.model))
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
    with saved.model.ema_scope():
        averages = {name: tensor.clone() for name, tensor in network_of(saved.model).items()}
    assert same(network_of(pipeline.model), averages if use_ema else network_of(saved.model))
    assert same(pipeline.model.cond_stage_model.state_dict(), saved.model.cond_stage_model.state_dict())
