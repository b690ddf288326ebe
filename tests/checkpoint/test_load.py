"""Loading of weights into modules: what is loaded, what may be missing, what is an error."""

import logging

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.checkpoint import CheckpointError, load_weights, read_weights, weights_on_meta
from ldm.util import instantiate_from_config
from tests.checkpoint.models import Model, Stage, same, save
from tests.tiny import text_model_config


def test_loading_fills_the_module_and_logs_one_line(tmp_path, caplog):
    source, target = Model(), Model()
    with caplog.at_level(logging.INFO, "ldm"):
        report = load_weights(target, save(tmp_path / "a.ckpt", source.state_dict() | {"extra.weight": torch.ones(1)}))
    assert same(target.state_dict(), source.state_dict())
    assert (report.loaded, report.missing, report.unexpected) == (len(source.state_dict()), (), ("extra.weight",))
    assert [record.getMessage() for record in caplog.records] == [str(report)]


def test_weights_of_a_loss_are_unexpected_only_where_the_module_has_a_loss(tmp_path):
    state = Stage().state_dict() | {"loss.logvar": torch.ones(1)}
    stage, trained = Stage(), Stage()
    trained.loss = nn.Linear(2, 2)
    assert load_weights(stage, save(tmp_path / "a.ckpt", state)).unexpected == ()
    state |= {f"loss.{name}": value for name, value in trained.loss.state_dict().items()}
    assert load_weights(trained, save(tmp_path / "b.ckpt", state)).unexpected == ("loss.logvar",)


def test_a_model_on_the_meta_device_gets_the_files_tensors_in_its_own_dtype(tmp_path):
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


def test_no_matching_name_is_an_error_that_shows_both_sides(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weight matches Model: the file has a\.weight.*the model betas"):
        load_weights(Model(), save(tmp_path / "a.ckpt", {"a.weight": torch.ones(1)}))


@pytest.mark.parametrize("name, flag", [("lora_unet_a.lora_up.weight", "--lora"), ("<digit>", "--embedding")])
def test_an_adapter_in_place_of_a_checkpoint_is_refused_with_its_flag(name, flag, tmp_path):
    with pytest.raises(CheckpointError, match=f"pass(ed)? .*with {flag}, and its"):
        load_weights(Model(), save(tmp_path / "a.ckpt", {name: torch.ones(1, 2)}))


def test_another_shape_is_an_error_that_names_it(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"model\.diffusion_model\.encoder\.weight: \(5, 2\), the model's \(3, 2\)"
    ):
        load_weights(Model(), save(tmp_path / "a.ckpt", Model(width=5).state_dict()))


def test_shapes_of_another_config_name_the_settings_that_the_file_needs(tmp_path):
    def model(**unet):
        config = text_model_config()
        config["model"]["params"]["unet_config"]["params"] |= unet
        return instantiate_from_config(config["model"])

    path = save(tmp_path / "a.ckpt", model(model_channels=64, context_dim=24).state_dict())
    with pytest.raises(CheckpointError) as error:
        load_weights(model(), path)
    needs = "the file needs unet_config.params.model_channels=64, unet_config.params.context_dim=24"
    assert str(error.value).endswith(needs) and str(error.value).count("the model's") == 3


@pytest.mark.parametrize("block", ["model", "first_stage_model", "first_stage_model.decoder", "cond_stage_model"])
def test_a_missing_block_is_an_error_unless_it_is_ignored(tmp_path, block):
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


def test_a_block_that_has_or_finds_its_weights_elsewhere_may_be_missing(tmp_path):
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


def test_ignored_names_are_not_read(tmp_path):
    model = Model()
    before = model.first_stage_model.encoder.weight.clone()
    load_weights(model, save(tmp_path / "a.ckpt", Model().state_dict()), ignore_keys=["first_stage_model"])
    assert torch.equal(model.first_stage_model.encoder.weight, before)


@pytest.mark.parametrize("bare", [False, True], ids=["whole file", "file of the part"])
def test_only_changes_the_part_asked_for(tmp_path, bare):
    source, model = Model(), Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_weights(model, save(tmp_path / "a.ckpt", (source.model if bare else source).state_dict()), only="model.")
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name] if name.startswith("model.") else before[name])


def test_weights_on_meta_keeps_buffers_and_ends_with_the_context():
    with weights_on_meta():
        model = instantiate_from_config(OmegaConf.create(text_model_config(use_ema=False))["model"])
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers()) and model.betas.shape == (100,)
    assert not torch.nn.Linear(2, 2).weight.is_meta
