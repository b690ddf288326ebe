"""Laws of `instantiate_from_config` and the allow-list."""

import re
import sys

import pytest
import torch
from omegaconf import OmegaConf

from ldm.config import instantiate as util
from ldm.config.instantiate import ConfigError, check_keys
from ldm.config.validate import check_targets
from ldm.util import get_obj_from_str, instantiate_from_config

LINEAR = {"target": "torch.nn.Linear", "params": {"in_features": 3, "out_features": 2}}


def test_a_config_becomes_its_object():
    layer = instantiate_from_config(OmegaConf.create(LINEAR))
    assert isinstance(layer, torch.nn.Linear) and layer.weight.shape == (2, 3)


def test_extra_arguments_join_the_params():
    assert instantiate_from_config(LINEAR, bias=False).bias is None


@pytest.mark.parametrize("marker", ["__is_first_stage__", "__is_unconditional__"])
def test_markers_build_nothing(marker):
    assert instantiate_from_config(marker) is None


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "runpy.run_path",
        "posix.system",
        "shutil.rmtree",
        "torch.load",
        "torch.hub.load",
        "torch.utils.cpp_extension.load",
        "torch.nnx.Linear",
        "ldmx.evil.Model",
        "main.os",
        "main.Trainer",
        "taming.models.vqgan.VQModel",
        "pytorch_lightning.Trainer",
        "ldm.config.instantiate.importlib",
        "ldm.config.instantiate.importlib.import_module",
        "ldm.config.instantiate.inspect.getsource",
        "torch.nn.modules.module.torch.load",
        "torch.nn.functional.relu",
        "ldm.util.get_obj_from_str",
        "ldm.checkpoint.load.os.system",
        "ldm.checkpoint.load.Path",
        "..os.system",
        "ldm..util",
        "os system",
        "",
        "ldm",
        7,
    ],
)
def test_targets_outside_the_allow_list_are_refused(target):
    with pytest.raises(ConfigError):
        instantiate_from_config({"target": target, "params": {"command": "touch /tmp/owned"}})


def test_a_refused_module_is_never_imported(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    (tmp_path / "main.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for target in ("evil_module.Model", "main.Model"):
        with pytest.raises(ConfigError, match="is not allowed"):
            get_obj_from_str(target)
    assert "evil_module" not in sys.modules


def test_an_allowed_package_of_the_user_resolves(tmp_path, monkeypatch):
    (tmp_path / "users_own_project.py").write_text(
        "class Model: pass\ndef factory(): return 3\nfrom os import system\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(util, "_user_prefixes", [])
    with pytest.raises(ConfigError, match="--allow-targets users_own_project"):
        get_obj_from_str("users_own_project.Model")
    util.allow_targets("users_own_project")
    assert get_obj_from_str("users_own_project.Model").__name__ == "Model"
    assert instantiate_from_config({"target": "users_own_project.factory"}) == 3
    with pytest.raises(ConfigError, match=r"is posix\.system"):
        get_obj_from_str("users_own_project.system")


def test_a_package_that_is_not_on_the_path_is_named(monkeypatch):
    monkeypatch.setattr(util, "_user_prefixes", ["not_on_the_path"])
    with pytest.raises(ConfigError, match="no module named not_on_the_path; is the folder that holds it on PYTHONPATH"):
        get_obj_from_str("not_on_the_path.keys.Network")


def test_published_targets_have_a_home_here():
    assert util.resolve_alias("main.ImageLogger") == "ldm.callbacks.ImageLogger"
    assert util.resolve_alias("taming.modules.losses.vqperceptual.X") == "ldm.modules.losses.vqperceptual.X"
    assert util.resolve_alias("ldm.models.autoencoder.AutoencoderKL") == "ldm.models.autoencoder.AutoencoderKL"


def test_an_unknown_parameter_names_its_path_and_the_nearest():
    config = OmegaConf.create(
        {"model": {"params": {"unet_config": {"target": "torch.nn.Linear", "params": {"in_featurs": 3}}}}}
    )
    with pytest.raises(
        ConfigError, match=r"model\.params\.unet_config\.params\.in_featurs: .*did you mean 'in_features'"
    ):
        instantiate_from_config(config.model.params.unet_config)


def test_a_missing_parameter_is_named():
    with pytest.raises(ConfigError, match=r"params: torch\.nn\.Linear needs out_features"):
        instantiate_from_config({"target": "torch.nn.Linear", "params": {"in_features": 3}})


@pytest.mark.parametrize("place", ["", "model."])
def test_an_error_of_an_inner_class_keeps_its_path_beside_other_sections(place):
    noise, unet = {"target": "ldm.models.diffusion.training_noise.Nois"}, {"target": "torch.nn.Identity", "params": {}}
    params = {"unet_config": unet, "noise_config": noise}
    root = {"target": "ldm.models.diffusion.ddpm.DDPM", "params": params}
    config = OmegaConf.create({"model": root}).model if place else OmegaConf.create(root)
    with pytest.raises(ConfigError, match=rf"^{place}params\.noise_config\.target: .* has no 'Nois'"):
        instantiate_from_config(config)


@pytest.mark.parametrize("key", ["in_features", "parms", "param"])
def test_arguments_and_misspelt_params_beside_target_are_refused(key):
    with pytest.raises(ConfigError, match=f"{key}: unknown key next to target; arguments of torch.nn.Linear go under"):
        instantiate_from_config(
            {"target": "torch.nn.Linear", "params": {"in_features": 1, "out_features": 1}, key: {"in_features": 3}}
        )


def test_other_keys_beside_target_are_logged_once_and_unused(caplog):
    config = OmegaConf.create({"model": {"target": "torch.nn.Identity", "cond_name": "depth"}})
    for _ in range(2):
        instantiate_from_config(config.model)
    assert [record.message for record in caplog.records] == ["model: cond_name has no effect"]


def test_only_items_of_a_list_have_a_weight(caplog):
    for path in ("data.params.train.params.datasets[0]", "data.params.train"):
        check_keys(["target", "weight"], (), "torch.nn.Identity", path)
    assert [record.message for record in caplog.records] == ["data.params.train: weight has no effect"]


@pytest.mark.parametrize("value", ["src,{0}", " {0}. ", "{0}"])
def test_the_environment_allows_targets_of_own_packages(monkeypatch, value):
    target = "email.message.Message"
    monkeypatch.delenv("LDM_ALLOW_TARGETS", raising=False)
    with pytest.raises(ConfigError, match="not allowed"):
        get_obj_from_str(target)
    monkeypatch.setenv("LDM_ALLOW_TARGETS", value.format("email"))
    assert get_obj_from_str(target).__name__ == "Message"
    monkeypatch.setenv("LDM_ALLOW_TARGETS", "other")
    with pytest.raises(ConfigError, match=r"Allowed packages: .*other"):
        get_obj_from_str(target)
    monkeypatch.setenv("LDM_ALLOW_TARGETS", "my project")
    with pytest.raises(ValueError, match=r"LDM_ALLOW_TARGETS=my project: .*expected a dotted package name"):
        get_obj_from_str(target)


def test_a_config_without_target_says_what_it_has():
    with pytest.raises(ConfigError, match="expected a mapping with the key 'target', got \\['params'\\]"):
        instantiate_from_config({"params": {}})


def test_a_misspelt_class_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'DDIMSampler'"):
        get_obj_from_str("ldm.models.diffusion.ddim.DDIMSample")


def test_arguments_of_a_base_class_are_accepted_through_kwargs():
    accepted, required = util.accepted_params(get_obj_from_str("ldm.models.diffusion.ddpm.LatentDiffusion"))
    assert {"linear_start", "cond_dropout", "unet_config"} <= accepted.keys() and {
        "first_stage_config",
        "cond_stage_config",
    } == required


class Fails:
    """A class whose constructor raises what it is given, as torch's do."""

    def __init__(self, kind: str = "", width: int = 0, sizes: dict | None = None, part: object = None):
        errors = {
            "assert": AssertionError(),
            "zero": ZeroDivisionError("integer modulo by zero"),
            "type": TypeError("bad operand"),
            "torch": RuntimeError("Trying to create tensor\nwith negative dimension"),
            "value": ValueError(f"width {width}: expected less"),
            "inside": ValueError("depth 3: expected less"),
            "memory": torch.OutOfMemoryError("CUDA out of memory"),
        }
        if part is not None:
            instantiate_from_config(part)
        if kind in errors:
            raise errors[kind]


def fails(**params):
    part = {"target": f"{__name__}.Fails", "params": params}
    return OmegaConf.create({"model": {"target": f"{__name__}.Fails", "params": {"part": part}}}).model


@pytest.mark.parametrize(
    "kind, words", [("assert", "Assertion"), ("zero", "modulo"), ("type", "bad"), ("torch", "tensor with")]
)
def test_an_error_of_a_constructor_names_the_node_and_its_values(kind, words):
    with pytest.raises(
        ConfigError, match=rf"^model\.params\.part: .* cannot be built with kind '{kind}': .*{words}"
    ) as error:
        instantiate_from_config(fails(kind=kind))
    assert "\n" not in str(error.value) and not hasattr(error.value, "__notes__")


def test_a_parameter_that_a_constructor_refuses_gets_its_path():
    with pytest.raises(ConfigError, match=r"^model\.params\.part\.params\.width 7: expected less$"):
        instantiate_from_config(fails(kind="value", width=7))
    with pytest.raises(ConfigError, match=r"^model\.params\.part\.params\.sizes\.depth 3: expected less$"):
        instantiate_from_config(fails(kind="inside", sizes={"depth": 3}))


def test_too_little_memory_is_no_error_of_the_config():
    with pytest.raises(torch.OutOfMemoryError):
        instantiate_from_config(fails(kind="memory"))


def test_values_are_converted_when_an_object_is_built():
    layer = instantiate_from_config(
        {"target": "torch.nn.Linear", "params": {"in_features": "1e1", "out_features": 2.0}}
    )
    assert layer.weight.shape == (2, 10)
    with pytest.raises(ConfigError, match=r"^params\.in_features 2\.5: expected an integer$"):
        instantiate_from_config({"target": "torch.nn.Linear", "params": {"in_features": 2.5, "out_features": 2}})


class Sloppy:
    def __init__(self, width: int = None, *, depth: float = None, size: "int | None" = None):  # noqa: RUF013
        self.width, self.depth = width, depth


def test_a_default_of_none_allows_null_whatever_the_annotation_says():
    config = {"target": f"{__name__}.Sloppy", "params": {"width": None, "depth": None, "size": None}}
    assert instantiate_from_config(config).width is None
    check_targets({"model": config})
    for params in ({"width": "x"}, {"depth": "x"}):
        with pytest.raises(ConfigError, match=r"'x': expected an? .* or null"):
            check_targets({"model": {**config, "params": params}})


@pytest.mark.parametrize(
    ("target", "name", "value", "expected"),
    [
        ("ldm.data.folder.ImageFolder", "flip_p", 2, "a number in [0, 1]"),
        ("ldm.data.inpainting.Inpainting", "whole_p", 2, "a number in [0, 1]"),
        ("ldm.data.superres.SuperResolution", "flip_p", -1, "a number in [0, 1]"),  # of its base
        ("ldm.data.datamodule.DataModuleFromConfig", "batch_size", 0, "an integer >= 1"),
        ("ldm.modules.encoders.modules.SpatialRescaler", "n_stages", -1, "an integer >= 0"),
    ],
)
def test_ranges_of_annotations_are_checked_where_a_class_is_built(target, name, value, expected):
    with pytest.raises(ConfigError, match=rf"params\.{name} {value}: expected {re.escape(expected)}$"):
        instantiate_from_config({"target": target, "params": {name: value}})
