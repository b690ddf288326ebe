"""YAML files and dotted overrides become one config."""

import logging
import re

import pytest
from omegaconf import OmegaConf

from ldm.config.instantiate import ConfigError
from ldm.config.merge import find_config, merge
from ldm.config.validate import check_config
from tests.config.toys import toy_config


def test_configs_merge_left_to_right_and_overrides_come_last(yaml):
    first = yaml(toy_config(trainer={"max_epochs": 3}), "a.yaml")
    second = yaml({"model": {"params": {"width": 5}}, "data": {"params": {"batch_size": 8}}}, "b.yaml")
    config = merge(
        [first, second], ["data.params.batch_size=16", "lightning.trainer.max_steps=7", "model.base_learning_rate=1e-5"]
    )
    check_config(config)
    assert config.model.params.width == 5 and config.data.params.batch_size == 16
    assert config.lightning.trainer == {"max_epochs": 3, "max_steps": 7} and config.model.base_learning_rate == 1e-5


@pytest.mark.parametrize(
    "override",
    [
        "model.params.monitor=x",  # a constructor's argument that no YAML sets
        "data.params.num_workers=0",
        "data.params.train.params.length=4",
        "lightning.callbacks.image_logger.params.batch_frequency=5",
        "lightning.modelcheckpoint.params.save_top_k=1",
        "lightning.seed=3",
        "+model.params.at.nothing.knows=1",
    ],
)
def test_an_override_may_be_new_if_a_class_takes_it(yaml, override):
    key, value = override.removeprefix("+").split("=")
    assert str(OmegaConf.select(merge([yaml(toy_config())], [override]), key)) == value


@pytest.mark.parametrize(
    "override, meant",
    [
        ("model.params.widht=4", "model.params.width"),
        ("model.parms.width=4", "model.params.width"),
        ("modle.params.width=4", "model.params.width"),
        ("model.params.moniter=4", "model.params.monitor"),
        ("data.params.batchsize=4", "data.params.batch_size"),
        ("data.params.train.params.lenght=4", "data.params.train.params.length"),
        ("lightning.trainer.max_epoch=4", "lightning.trainer.max_epochs"),
        ("lightning.callbacks.image_loger.params.max_images=4", "lightning.callbacks.image_logger"),
        ("lightning.callbacks.image_logger.params.batch_frequenzy=4", "batch_frequency"),
        ("lightning.sed=4", "lightning.seed"),
    ],
)
def test_a_misspelt_override_is_refused_with_the_nearest_path(yaml, override, meant):
    with pytest.raises(ConfigError, match=f"did you mean {meant}" if "." in meant else meant):
        merge([yaml(toy_config())], [override])


@pytest.mark.parametrize(
    "path",
    [
        "model.params.zzz",  # the constructor is known
        "model.prams",
        "data.params.train.zzz",
        "lightning.zzz",
        "lightning.trainer.zzz",
        "lightning.callbacks.zzz",
        "model.params.at.zzz",
    ],
)
def test_a_plus_is_suggested_only_if_it_helps(yaml, path, caplog):
    """at: a mapping that no class describes, with something in it."""
    files = [yaml(OmegaConf.merge(toy_config(), {"model": {"params": {"at": {"3": "nan"}}}}))]
    with pytest.raises(ConfigError, match=f"has no {path.rpartition('.')[2]}") as error:
        merge(files, [f"{path}=1"])
    caplog.clear()
    try:
        check_config(merge(files, [f"+{path}=1"]))
        helps = "has no effect" not in caplog.text
    except ConfigError:
        helps = False
    assert (f"+{path}=..." in str(error.value)) is helps


@pytest.mark.parametrize(
    "override, whole",
    [
        ("model.params.at.steps.1=5", r"model.params.at.steps=\[1,5,3\]"),
        ("+model.params.at.steps.1=5", r"model.params.at.steps=\[1,5,3\]"),
        ("model.params.at.steps.7=5", r"model.params.at.steps=\[1,2,3\]"),
        ("model.params.at.steps.1.x=5", r"model.params.at.steps=\[1,2,3\]"),
        ("model.params.at.nodes.0=5", "model.params.at.nodes is a list; give the whole list$"),
    ],
)
def test_an_item_of_a_list_is_refused_with_the_whole_list(yaml, override, whole):
    files = [
        yaml(OmegaConf.merge(toy_config(), {"model": {"params": {"at": {"steps": [1, 2, 3], "nodes": [{"a": 1}]}}}}))
    ]
    with pytest.raises(ConfigError, match=f"{re.escape(override)}: .* is a list; give the whole list.*") as error:
        merge(files, [override])
    assert re.search(whole, str(error.value))


@pytest.mark.parametrize("override", ["data.params.batch_size.x=3", "model.params.width=[1,", "model.params.zzz=1"])
def test_an_invalid_override_is_refused_in_one_line(yaml, override):
    with pytest.raises(ConfigError, match=override.split("=")[0]) as error:
        merge([yaml(toy_config())], [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1,\n", "a: 1\na: 2\n", "\x00"])
def test_an_invalid_yaml_is_named(yaml, content):
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        check_config(merge([yaml(content)]))


def test_a_missing_config_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean configs/autoencoder/autoencoder_kl_32x32x4\.yaml"):
        find_config("configs/autoencoder/autoencoder_kl_32x32.yaml")


def test_a_config_is_suggested_only_if_its_name_is_similar():
    with pytest.raises(ConfigError, match=r"did you mean environment\.yaml\?"):
        find_config("enviroment.yaml")
    with pytest.raises(ConfigError, match=r"no such file here or in [^;]*$"):
        find_config("nosuch.yaml")


def test_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/autoencoder/autoencoder_kl_32x32x4.yaml").is_file()


def test_a_yaml_replaces_a_mapping_or_deletes_a_key(yaml):
    base = yaml(toy_config(callbacks={"a": {"x": 1}, "b": {"y": 2}}, trainer={"max_steps": 3}), "a.yaml")
    marks = (
        "model: {params: {_replace_: true, monitor: x}}\nlightning: {callbacks: {~a: , b: {z: 3}}, ~trainer: }\n"
        "data: {params: {train: {_replace_: false}}}\n"
    )
    config = merge([base, yaml(marks, "b.yaml")])
    assert config.model.params == {"monitor": "x"} and config.model.target == "tests.toys.Toy"
    assert config.lightning == {"callbacks": {"b": {"y": 2, "z": 3}}} and "target" in config.data.params.train


def test_a_mapping_that_differs_from_the_one_to_be_replaced_is_logged(yaml, caplog):
    above = yaml("model: {target: own.Net, _replace_: {target: tests.toys.Toy, params: {width: 8}}}", "b.yaml")
    for width, logged in ((8, []), (4, ["config      model.params.width: is 4, but what replaces it was made with 8"])):
        below = yaml(f"model: {{target: tests.toys.Toy, params: {{width: {width}}}}}", "a.yaml")
        with caplog.at_level(logging.WARNING, "ldm"):
            assert merge([below, above]).model == {"target": "own.Net"}
        assert caplog.messages == logged


def test_the_command_line_deletes_a_key_too(yaml):
    overrides = ["~model.params.width", "~data.params.train", "data.params.train.target=tests.toys.Images"]
    config = merge([yaml(toy_config())], overrides)
    assert config.model.params == {} and config.data.params.train == {"target": "tests.toys.Images"}


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "model: {params: {~widht: }}",
            r"b\.yaml: ~model\.params\.widht: no such key to delete; did you mean 'width'\?",
        ),
        ("model: {params: {~width: 3}}", r"b\.yaml: model\.params\.~width: a key that is deleted takes no value"),
        ("model: {params: {_replace_: 3}}", r"b\.yaml: model\.params\._replace_ 3: expected true or false"),
    ],
)
def test_a_mark_that_cannot_be_meant_is_refused(yaml, text, message):
    with pytest.raises(ConfigError, match=message):
        merge([yaml(toy_config(), "a.yaml"), yaml(text, "b.yaml")])


def test_another_target_with_parameters_of_the_old_one_is_refused_unless_they_are_dropped(yaml):
    base = yaml(toy_config(), "a.yaml")
    new = "model: {target: ldm.modules.ema.LitEma, params: {%sdecay: 0.5}}"
    with pytest.raises(ConfigError, match=r"model\.params: .*LitEma takes no width, set for tests.*Toy.*_repl"):
        merge([base, yaml(new % "", "b.yaml")])
    assert merge([base, yaml(new % "_replace_: true, ", "b.yaml")]).model.params == {"decay": 0.5}
    assert merge([base, yaml(new % "", "b.yaml")], ["~model.params.width"]).model.params == {"decay": 0.5}
    with pytest.raises(ConfigError, match=r"~model\.params on the command line"):
        merge([base], ["model.target=ldm.modules.ema.LitEma"])


def test_choices_name_a_key_once(yaml):
    with pytest.raises(ConfigError, match="choices: ") as caught:
        merge([yaml(toy_config())], ["model.params._replace_=true"])
    choices = re.split(r", | \(", str(caught.value).partition("choices: ")[2])
    assert "width" in choices and len(set(choices)) == len(choices)
