"""Published names, and averages in place of weights."""

import logging

import torch

from ldm.checkpoint import load_weights, read_weights
from tests.checkpoint.models import WEIGHTS, Model, Stage, same, save
from tests.reference import randn


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


def test_use_ema_replaces_the_weights_by_their_averages(tmp_path):
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


def test_use_ema_without_averages_warns_and_uses_the_weights(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert same(read_weights(save(tmp_path / "a.ckpt", WEIGHTS), use_ema=True), WEIGHTS)
    assert "no EMA weights in the file" in caplog.text


def test_averages_start_from_the_loaded_weights_if_the_file_has_none(tmp_path):
    path = save(tmp_path / "a.ckpt", Model().state_dict())
    model = Model(ema=True)
    report = load_weights(model, path)
    assert report.ema_started
    for name, parameter in model.model.named_parameters():
        assert torch.equal(getattr(model.model_ema, name.replace(".", "")), parameter)
