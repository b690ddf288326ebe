"""Run directories on the scripts' command lines."""

import pytest

from ldm.inference.runs import find_run, run_of


def test_a_run_is_found_by_its_folder_and_by_every_checkpoint_in_it(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "configs").mkdir()
    for name in ("checkpoints/last.ckpt", "checkpoints/epoch=1.ckpt"):
        (tmp_path / "run" / name).touch()
    for name in ("2-project", "1-project", "1-lightning"):
        (tmp_path / "run" / "configs" / f"{name}.yaml").touch()
    for resume in ("run", "run/checkpoints", "run/checkpoints/epoch=1.ckpt"):
        folder, configs, ckpt = find_run(tmp_path / resume)
        assert folder == tmp_path / "run" and [path.name for path in configs] == ["2-project.yaml"]
        assert ckpt.name == ("epoch=1.ckpt" if resume.endswith("ckpt") else "last.ckpt")
    (tmp_path / "run" / "model.ckpt").touch()
    (tmp_path / "run" / "config.yaml").touch()
    assert find_run(tmp_path / "run") == (
        tmp_path / "run",
        [tmp_path / "run" / "config.yaml"],
        tmp_path / "run" / "model.ckpt",
    )


def test_weights_belong_to_a_run_only_in_its_folder_or_its_checkpoints(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "configs").mkdir()
    (tmp_path / "run" / "configs" / "1-project.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"--ckpt .*run: no model.ckpt or checkpoints/last.ckpt"):
        run_of(tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.touch()
    runs = [run_of(path) for path in (tmp_path / "run", last.parent, last)]
    assert {run.ckpt if run else None for run in runs} == {last}
    (tmp_path / "sd.ckpt").touch()
    (tmp_path / "config.yaml").touch()  # perhaps of another model
    (tmp_path / "unet").mkdir()
    assert run_of(tmp_path / "sd.ckpt") is None and run_of(tmp_path / "unet") is None and run_of("missing.ckpt") is None
