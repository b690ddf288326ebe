"""Flags of `python -m benchmarks`, and a row without diffusers; tests/convert/test_diffusers.py runs those with it."""

import pytest

from benchmarks.__main__ import main

pytest.importorskip("diffusers", reason="pip install -e '.[test]' installs it")


def test_a_dry_run_measures_and_writes_nothing(tmp_path, capsys):
    assert main(["cpu", "--dry-run", "--out", str(tmp_path / "results"), "--only", "loader"]) == 0
    assert "ratio" in capsys.readouterr().out and not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("argv", "error"),
    [(["cpu", "--only", "nothing"], "--only nothing: choose of unet-bf16"), (["cpu", "--repeat", "0"], "--repeat 0")],
)
def test_invalid_flags_are_refused(argv, error):
    with pytest.raises(ValueError, match=error):
        main(argv)
