"""Trainer settings of Lightning 1.4 in current terms."""

import pytest

from ldm.config.signature import constructor_arguments
from ldm.config.trainer_keys import REMOVED_SETTINGS, TRANSLATED, modernize


@pytest.mark.parametrize(
    "then, now",
    [
        ({"precision": 16}, {"precision": "16-mixed"}),
        ({"precision": "bf16"}, {"precision": "bf16-mixed"}),
        ({"precision": 32}, {"precision": "32-true"}),
        ({"accelerator": "ddp"}, {"strategy": "ddp"}),
        ({"distributed_backend": "ddp"}, {"strategy": "ddp"}),
        ({"accelerator": "ddp", "strategy": "fsdp"}, {"strategy": "fsdp"}),
        ({"accelerator": "cpu"}, {"accelerator": "cpu"}),
        ({"num_processes": 2}, {"accelerator": "cpu", "devices": 2}),
        ({"max_steps": None}, {"max_steps": -1}),
        ({"checkpoint_callback": False}, {"enable_checkpointing": False}),
        ({"weights_summary": "full"}, {"enable_model_summary": True}),
        ({"progress_bar_refresh_rate": 0}, {"enable_progress_bar": False}),
        ({"progress_bar_refresh_rate": 20}, {}),
        ({"replace_sampler_ddp": False}, {"use_distributed_sampler": False}),
        ({"terminate_on_nan": True, "amp_backend": "native", "benchmark": True}, {"benchmark": True}),
    ],
)
def test_published_trainer_settings_are_translated(then, now):
    assert modernize(then) == now


@pytest.mark.parametrize(
    "name, value",
    [("accelerator", "dp"), ("auto_lr_find", True), ("terminate_on_nan", False), ("precision", 8), ("tpu_cores", 8)],
)
def test_removed_settings_say_what_to_do_instead(name, value):
    with pytest.raises(ValueError, match=f"--{name} {value}: "):
        modernize({name: value}, "--")


def test_every_setting_of_lightning_1_4_is_known_once():
    assert not set(REMOVED_SETTINGS) & set(TRANSLATED)
    assert not (set(REMOVED_SETTINGS) | set(TRANSLATED)) & set(constructor_arguments("pytorch_lightning.Trainer"))
