"""A config's target is a class of an allowed package or it is refused, at any depth and by every entry point."""

import contextlib
import sys
from copy import deepcopy

import pytest
from omegaconf import OmegaConf

from ldm.cli import run_command
from ldm.config import instantiate as util
from ldm.config import merge as training_config
from ldm.config.instantiate import ConfigError, check_allowed
from ldm.config.model_info import read_config
from ldm.config.validate import check_config, check_targets
from ldm.models import autoencoder  # noqa: F401  # imports the real taming, before `evil` puts another on the path
from ldm.training.run_directory import RunDirectory
from ldm.training.session import run_training as train
from ldm.training.trainer import _check_filename, _loggers
from ldm.util import get_obj_from_str, instantiate_from_config
from scripts import sample_diffusion, txt2img
from tests.hostile.configs import NO_NAMES, OUTSIDE, RE_EXPORTS, YAML
from tests.tiny import text_model_config

TRAINING = {
    **text_model_config(),
    "data": {
        "target": "main.DataModuleFromConfig",
        "params": {"batch_size": 1, "train": {"target": "ldm.data.digits.Digits"}},
    },
    "lightning": {
        "callbacks": {"image_logger": {"target": "main.ImageLogger", "params": {"batch_frequency": 1}}},
        "trainer": {"max_steps": 1},
    },
}
PLACES = (  # wherever a config can name a class
    "model.target",
    "model.params.unet_config.target",
    "model.params.first_stage_config.target",
    "model.params.first_stage_config.params.lossconfig.target",
    "model.params.cond_stage_config.target",
    "model.params.scheduler_config.target",
    "data.target",
    "data.params.train.target",
    "data.params.validation.target",
    "lightning.callbacks.image_logger.target",
    "lightning.callbacks.image_logger.params.log_images_kwargs.deep.deeper.target",
    "lightning.modelcheckpoint.target",
    "lightning.logger.target",
)


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """Modules that leave a canary when they are imported, where Python finds them first."""
    canary, folder = tmp_path / "canary", tmp_path / "modules"
    (folder / "evil").mkdir(parents=True)
    for name in ("main.py", "evil/__init__.py", "evil/sub.py", "ldm_evil.py", "ldmx.py", "taming.py"):
        (folder / name).write_text(f"open({str(canary)!r}, 'w')\nclass Model: pass\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(util, "_user_prefixes", [])
    for name in ("main", "taming"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield canary
    assert not canary.exists()


def test_there_are_forty_and_more():
    assert (
        len(OUTSIDE) >= 40 and len(RE_EXPORTS) >= 40 and len({*OUTSIDE, *RE_EXPORTS}) == len(OUTSIDE) + len(RE_EXPORTS)
    )


@pytest.mark.parametrize("target", [*OUTSIDE, *NO_NAMES], ids=repr)
def test_a_target_outside_the_packages_is_refused_before_anything_is_imported(target, evil):
    before = set(sys.modules)
    for refuse in (
        check_allowed,
        get_obj_from_str,
        lambda t: instantiate_from_config({"target": t, "params": {"command": f"touch {evil}"}}),
    ):
        with pytest.raises(ConfigError) as caught:
            refuse(target)
        assert "\n" not in str(caught.value)
    assert set(sys.modules) == before


@pytest.mark.parametrize("target", ["os.system", "posix.system", "subprocess.Popen", "builtins.eval"])
def test_nobody_is_told_how_to_allow_pythons_own(target, monkeypatch):
    monkeypatch.setattr(util, "_user_prefixes", [])
    with pytest.raises(ConfigError, match="standard-library module") as caught:
        check_allowed(target)
    assert "--allow-targets" not in str(caught.value)


@pytest.mark.parametrize("target", RE_EXPORTS)
def test_what_an_allowed_module_merely_holds_is_refused(target, evil):
    with pytest.raises(ConfigError):
        instantiate_from_config({"target": target, "params": {"command": f"touch {evil}"}})


@pytest.mark.parametrize("place", PLACES)
def test_a_target_is_refused_wherever_it_stands_before_torch_is_asked_for_anything(place, evil):
    for target in ("os.system", "evil.Model", "main.os.system", "ldm.data.nothing.Model"):
        config = OmegaConf.merge(TRAINING, OmegaConf.from_dotlist([f"{place}={target}"]))
        with pytest.raises(ConfigError, match=place.removesuffix(".target")):
            check_targets(OmegaConf.to_container(config))


def test_lists_in_lists_hide_nothing(evil):
    hidden = {"target": "evil.Model"}
    for _ in range(50):
        hidden = [{"inner": [hidden]}]
    with pytest.raises(ConfigError, match=r"\[0\]\.inner\[0\].*is not allowed"):
        check_targets({"model": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"ddconfig": hidden}}})


def trained(argv, capsys):
    code = train([*argv, "-t"])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("place", PLACES)
def test_training_refuses_a_hostile_yaml_and_a_hostile_override_in_one_line(place, evil, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = tmp_path / "hostile.yaml"
    OmegaConf.save(OmegaConf.merge(TRAINING, OmegaConf.from_dotlist([f"{place}=evil.Model"])), hostile)
    code, said = trained(["--base", str(hostile)], capsys)
    assert (
        code == 2
        and "'evil.Model' is not allowed" in said
        and "Traceback" not in said
        and not (tmp_path / "logs").exists()
    )
    good = tmp_path / "good.yaml"
    OmegaConf.save(OmegaConf.create(TRAINING), good)
    code, said = trained(["--base", str(good), f"+{place}=evil.Model"], capsys)
    assert code == 2 and "Traceback" not in said and "evil.Model" in said


def test_a_yaml_cannot_widen_the_list_and_the_command_line_can(evil, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"
    for extra in ({"allow_targets": ["evil"]}, {"allow-targets": "evil"}):
        OmegaConf.save(OmegaConf.create({**deepcopy(TRAINING), **extra, "model": {"target": "evil.Model"}}), file)
        code, said = trained(["--base", str(file)], capsys)
        assert code == 2 and "unknown key allow" in said
        with contextlib.suppress(ConfigError):
            instantiate_from_config(read_config(file).model)
    OmegaConf.save(
        OmegaConf.create({"model": {"target": "ldm.util.allow_targets", "params": {"prefixes": "evil"}}}), file
    )
    with pytest.raises(ConfigError, match="not a class"):
        instantiate_from_config(read_config(file).model)
    with pytest.raises(ConfigError):
        get_obj_from_str("evil.Model")
    assert not evil.exists()
    util.allow_targets("evil")  # as --allow-targets does
    assert get_obj_from_str("evil.Model").__name__ == "Model" and evil.exists()
    evil.unlink()


def test_an_interpolated_target_is_refused_as_it_reads_in_the_end(evil, monkeypatch):
    monkeypatch.setenv("TARGET", "evil.Model")
    for config in (
        "{a: evil, model: {target: '${a}.Model'}}",
        "{model: {target: '${oc.env:TARGET}'}}",
        "{a: {b: evil.Model}, model: {target: '${a.b}'}}",
    ):
        with pytest.raises(ConfigError, match=r"'evil\.Model' is not allowed"):
            instantiate_from_config(OmegaConf.create(config).model)


@pytest.mark.parametrize("what", YAML)
def test_a_yaml_is_data_and_ends(what, evil, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_bytes(YAML[what].replace("CANARY", str(evil)).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"c\.yaml") as caught:
        read_config(file)
    assert "\n" not in " ".join(str(caught.value).splitlines()[:1])
    with pytest.raises(ConfigError):
        check_config(training_config.merge([file]))
    assert run_command(txt2img.main, ["--config", str(file), "--ckpt", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(file) in said


@pytest.mark.parametrize(
    "value", ["!!python/object/apply:os.system ['touch CANARY']", "!!python/name:os.system", "${evil:x}", "!evil x"]
)
def test_an_override_is_data_too(value, evil):
    with pytest.raises(ConfigError):
        check_config(
            OmegaConf.merge(
                training_config._apply(
                    OmegaConf.create(TRAINING),
                    f"model.params.scale_factor={value.replace('CANARY', str(evil))}",
                    {},
                )
            )
        )


def test_a_resumed_folder_is_trusted_no_more_than_any_other_file(evil, tmp_path, capsys):
    folder = tmp_path / "logs" / "run"
    for name in ("configs", "checkpoints"):
        (folder / name).mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"x")
    for number, text in enumerate(
        (
            "model: {target: evil.Model}",
            "model: !!python/module:evil",
            "model: {target: os.system, params: {command: 'touch canary'}}",
        )
    ):
        OmegaConf.save(OmegaConf.create(TRAINING), folder / "configs" / "1-project.yaml")
        (folder / "configs" / "2-project.yaml").write_text(text)
        code, said = trained(["--resume", str(folder)], capsys)
        assert code == 2 and "Traceback" not in said, number
        assert run_command(sample_diffusion.main, ["-r", str(folder), "-n", "1"]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_a_logger_is_a_logger_and_a_checkpoint_stays_in_its_folder(tmp_path, capsys, monkeypatch):
    with pytest.raises(ConfigError, match="is not a Lightning logger"):
        _loggers(
            OmegaConf.create(
                {"logger": {"target": "ldm.output.images.NumberedFiles", "params": {"folder": str(tmp_path / "new")}}}
            ),
            RunDirectory(tmp_path, "now"),
        )
    assert not (tmp_path / "new").exists()
    for bad in (
        "../{epoch}",
        "/tmp/{epoch}",
        "a/../../b",
        "{../epoch}",
        "{epoch}/{../../step}",
        "~/x",
        "",
        "x" * 300,
        "a\0b",
    ):
        with pytest.raises(ConfigError, match="filename"):
            _check_filename("filename", bad)
    for good in (None, "{epoch:06}", "{epoch:06}-{val/loss:.2f}", "best", "a..b-{step}"):
        _check_filename("filename", good)
