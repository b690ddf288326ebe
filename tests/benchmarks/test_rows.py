"""Flags of `python -m benchmarks`, and a row without diffusers; tests/convert/test_diffusers.py runs those with it."""

import json
import sys

import pytest

from benchmarks.__main__ import main
from benchmarks.report import PAGE

pytest.importorskip("diffusers", reason="pip install -e '.[test]' installs it")


def test_a_dry_run_measures_and_writes_nothing(tmp_path, capsys):
    assert main(["cpu", "--dry-run", "--out", str(tmp_path / "results"), "--only", "loader"]) == 0
    assert "ratio" in capsys.readouterr().out and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["cpu", "--only", "nothing"], "--only nothing: choose of unet-bf16"),
        (["cpu", "--repeat", "0"], "--repeat 0"),
        (["report", "--only", "start"], "report: --only has no effect"),
    ],
)
def test_invalid_flags_are_refused(argv, error):
    with pytest.raises(ValueError, match=error):
        main(argv)


def test_a_missing_word_is_named_by_its_choices(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "required: cpu|gpu|report" in capsys.readouterr().err


def test_diffusers_that_cannot_be_imported_is_one_line_with_advice(tmp_path, monkeypatch):
    (tmp_path / "diffusers.py").write_text("raise RuntimeError('huggingface-hub>=9 is required')")
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"\(huggingface-hub>=9 is required\): pip install --upgrade"):
        main(["cpu", "--dry-run", "--only", "loader"])


def test_the_report_of_another_folder_is_written_there(tmp_path, capsys):
    row = {"order": 0, "time": "", "what": "w", "size": "full", "void": "v"}
    saved = {"environment": {"machine": "m"}, "rows": {"start": row}}
    (tmp_path / "m.json").write_text(json.dumps(saved))
    before = PAGE.read_bytes()
    assert main(["report", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / PAGE.name}\n" and PAGE.read_bytes() == before
    assert "void: v" in (tmp_path / PAGE.name).read_text() and (tmp_path / PAGE.name).with_suffix(".svg").exists()
