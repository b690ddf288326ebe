"""Run directories of new and resumed runs."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ldm.config.files import config_text
from ldm.config.instantiate import ConfigError
from ldm.config.merge import merge
from ldm.training.flags import RunOptions
from ldm.training.run_directory import RunDirectory, new_run, resumed_run, saved_configs


def test_the_name_is_time_name_postfix(tmp_path):
    options = RunOptions(base=("configs/my-model.yaml",), logdir=str(tmp_path))
    assert new_run(options, "T").path == tmp_path / "T_my-model"
    named = RunOptions(name="x", postfix="_p", base=("a.yaml",), logdir=str(tmp_path), project="group")
    assert new_run(named, "T").path == tmp_path / "group" / "T_x_p"
    assert new_run(RunOptions(name="x", debug=True, logdir=str(tmp_path)), "T").path == tmp_path / "debug_runs" / "T_x"


def test_two_runs_of_one_second_get_two_directories(tmp_path):
    options = RunOptions(name="x", logdir=str(tmp_path))
    new_run(options, "T").path.mkdir()
    assert new_run(options, "T").path == tmp_path / "T_x-2"


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", "..", "a\0b", "x" * 300, "a\\b"])
@pytest.mark.parametrize("flag", ["name", "postfix", "project"])
def test_run_directories_stay_in_the_log_folder(flag, name, tmp_path):
    with pytest.raises(ConfigError, match=f"--{flag}"):
        new_run(RunOptions(base=("a.yaml",), logdir=str(tmp_path), **{flag: name}))


def test_a_run_is_resumed_from_its_directory_or_a_file_two_levels_below(tmp_path):
    run = tmp_path / "logs" / "T_x"
    for folder in ("checkpoints", "configs"):
        (run / folder).mkdir(parents=True)
    for name in ("2-project.yaml", "1-project.yaml", "1-lightning.yaml"):
        (run / "configs" / name).write_text("{model: {}, data: {}, lightning: {}}")
    (run / "checkpoints" / "last.ckpt").touch()
    assert resumed_run(str(run) + "/").path == run and resumed_run(str(run)).checkpoint is None
    from_file = resumed_run(str(run / "checkpoints" / "last.ckpt"))
    assert from_file.path == run and from_file.checkpoint == run / "checkpoints" / "last.ckpt"
    assert [path.name for path in saved_configs(from_file)] == ["1-lightning.yaml", "2-project.yaml"]


def test_resuming_a_missing_run_names_the_newest(tmp_path):
    (tmp_path / "T_x" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"the newest run in .* is T_x"):
        resumed_run(str(tmp_path / "T_y"))
    (tmp_path / "lone.ckpt").touch()
    with pytest.raises(ConfigError, match="is not a run directory"):
        resumed_run(str(tmp_path / "lone.ckpt"))
    (tmp_path / "T_x" / "configs").mkdir()
    (tmp_path / "T_x" / "checkpoints" / "lora.safetensors").touch()
    with pytest.raises(ConfigError, match=r"weights without the state of a run; pass .*T_x or a \.ckpt in it"):
        resumed_run(str(tmp_path / "T_x" / "checkpoints" / "lora.safetensors"))


PROJECT = config_text(OmegaConf.create({"model": {"a": 1}, "data": {"b": 2}}))
LIGHTNING = config_text(OmegaConf.create({"lightning": {"seed": 3}}))


def run_with(folder, **configs):
    (folder / "configs").mkdir(parents=True)
    for name, text in configs.items():
        (folder / "configs" / f"{name.replace('_', '-')}.yaml").write_bytes(text)
    return RunDirectory(folder, "T", resumed=True)


def test_a_key_that_a_start_deleted_stays_deleted(tmp_path):
    first = config_text(OmegaConf.create({"model": {"a": 1, "old": 1}, "data": {"b": 2}}))
    directory = run_with(tmp_path, T1_project=first.encode(), T2_project=PROJECT.encode())
    assert merge(saved_configs(directory)).model == {"a": 1}


def test_lines_may_be_added_to_a_saved_config(tmp_path):
    directory = run_with(tmp_path, T1_project=f"{PROJECT}safety: off\n".encode())
    assert [path.name for path in saved_configs(directory)] == ["T1-project.yaml"]


@pytest.mark.parametrize("size", [0, 1, 30, 60, len(PROJECT) - 3])
def test_a_damaged_config_is_skipped_if_an_older_start_saved_all(tmp_path, size, caplog):
    directory = run_with(
        tmp_path, T1_project=PROJECT.encode(), T1_lightning=LIGHTNING.encode(), T2_project=PROJECT.encode()[:size]
    )
    assert [path.name for path in saved_configs(directory)] == ["T1-lightning.yaml", "T1-project.yaml"]
    assert "T2-project.yaml: " in caplog.text and "changes made at that start are lost" in caplog.text


@pytest.mark.parametrize(
    "content", [b"", b"model: [", PROJECT.encode()[:-8], b"\0" * 50, b"\xff\xfe", b"- 1", b"model: {}"]
)
def test_a_damaged_config_without_another_names_the_file_and_what_to_do(tmp_path, content):
    directory = run_with(tmp_path, T1_project=content, T1_lightning=LIGHTNING.encode())
    with pytest.raises(ConfigError, match=r"T1-project\.yaml: .*--base CONFIG\.yaml"):
        saved_configs(directory)
    assert [path.name for path in saved_configs(directory, [Path("given.yaml")])] == ["T1-lightning.yaml"]


def test_a_deleted_config_is_named(tmp_path, caplog):
    directory = run_with(tmp_path / "a", T1_lightning=LIGHTNING.encode())
    with pytest.raises(ConfigError, match=r"configs/\*-project\.yaml: missing; restore it, or .* --base CONFIG\.yaml"):
        saved_configs(directory)
    assert len(saved_configs(directory, [Path("given.yaml")])) == 1 and not caplog.text
    saved_configs(run_with(tmp_path / "b", T1_project=PROJECT.encode()))
    assert "configs/*-lightning.yaml: missing" in caplog.text
