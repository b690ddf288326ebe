"""Run directories of new and resumed runs."""

import pytest

from ldm.config.instantiate import ConfigError
from ldm.training.flags import RunOptions
from ldm.training.run_directory import new_run, resumed_run, saved_configs


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
        (run / "configs" / name).write_text("{}")
    (run / "checkpoints" / "last.ckpt").touch()
    assert resumed_run(str(run) + "/").path == run and resumed_run(str(run)).checkpoint is None
    from_file = resumed_run(str(run / "checkpoints" / "last.ckpt"))
    assert from_file.path == run and from_file.checkpoint == run / "checkpoints" / "last.ckpt"
    assert [path.name for path in saved_configs(from_file)] == ["1-lightning.yaml", "1-project.yaml", "2-project.yaml"]


def test_resuming_a_missing_run_names_the_newest(tmp_path):
    (tmp_path / "T_x" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"the newest run in .* is T_x"):
        resumed_run(str(tmp_path / "T_y"))
    (tmp_path / "lone.ckpt").touch()
    with pytest.raises(ConfigError, match="is not a run directory"):
        resumed_run(str(tmp_path / "lone.ckpt"))
