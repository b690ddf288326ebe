"""Settings of a run: flags over YAML, seed and learning rate."""

import pytest
from omegaconf import OmegaConf

from ldm.config.instantiate import ConfigError
from ldm.training.devices import Machine, choose_devices
from ldm.training.flags import RunOptions
from ldm.training.settings import learning_rate, resolve_settings
from tests.config.toys import toy_config


def test_flags_for_devices_replace_those_of_a_yaml():
    lightning = OmegaConf.create({"trainer": {"accelerator": "ddp", "gpus": "0,1,2,3,", "benchmark": True}})
    settings = resolve_settings(RunOptions(base=("a",), trainer={"devices": "1", "accelerator": "cpu"}), lightning)
    assert choose_devices(settings.devices, Machine()).accelerator == "cpu" and settings.trainer == {"benchmark": True}
    assert settings.lightning.trainer == {"benchmark": True, "devices": "1", "accelerator": "cpu"}


@pytest.mark.parametrize("scale_lr, value", [(None, 3 * 2 * 4 * 1e-3), (True, 3 * 2 * 4 * 1e-3), (False, 1e-3)])
def test_learning_rate_is_accumulation_times_devices_times_batch_times_base(scale_lr, value):
    config = OmegaConf.merge(toy_config(), {"data": {"params": {"batch_size": 4}}})
    settings = resolve_settings(
        RunOptions(base=("a",), scale_lr=scale_lr, trainer={"accumulate_grad_batches": 3}), OmegaConf.create({})
    )
    assert learning_rate(config, settings, devices=2).value == pytest.approx(value)


@pytest.mark.parametrize("path", ["model.base_learning_rate", "data.params.batch_size"])
def test_a_missing_rate_or_batch_size_is_named(path):
    config = OmegaConf.create(toy_config())
    OmegaConf.update(config, path, None)
    with pytest.raises(ConfigError, match=path):
        learning_rate(config, resolve_settings(RunOptions(base=("a",)), OmegaConf.create({})), devices=1)


@pytest.mark.parametrize(
    "flag, yaml, scaled", [(None, None, True), (None, False, False), (True, False, True), (False, True, False)]
)
def test_scaling_comes_from_the_flag_then_the_yaml_then_is_on(flag, yaml, scaled):
    settings = resolve_settings(RunOptions(scale_lr=flag), OmegaConf.create({} if yaml is None else {"scale_lr": yaml}))
    assert settings.scale_lr is scaled and settings.lightning.scale_lr is scaled


def test_seed_comes_from_the_flag_then_the_yaml_then_is_23():
    assert resolve_settings(RunOptions(), OmegaConf.create({})).seed == 23
    assert resolve_settings(RunOptions(), OmegaConf.create({"seed": 4})).seed == 4
    assert resolve_settings(RunOptions(seed=0), OmegaConf.create({"seed": 4})).lightning.seed == 0
    with pytest.raises(ConfigError, match="--seed 4294967296: expected an integer from 0 to 4294967295"):
        resolve_settings(RunOptions(seed=1 << 32), OmegaConf.create({}))


def test_trainer_settings_are_converted_whether_they_come_from_flags_or_from_a_yaml():
    options = RunOptions(trainer={"max_steps": 100.0, "limit_val_batches": 1.0})
    assert resolve_settings(options, OmegaConf.create({})).trainer == {"max_steps": 100, "limit_val_batches": 1.0}
    with pytest.raises(ConfigError, match=r"^--max_steps 3\.7: expected an integer >= -1 or null$"):
        resolve_settings(RunOptions(trainer={"max_steps": 3.7}), OmegaConf.create({}))
