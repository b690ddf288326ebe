"""Every row runs with a tiny model, and its two sides agree."""

import pytest

from benchmarks.__main__ import main

pytest.importorskip("diffusers", reason="pip install -e '.[test]' installs it")


def test_the_dry_run_measures_every_row_in_this_process_and_writes_nothing(tmp_path, capsys):
    patterns = ["unet-fp32", "decode-fp32", "text-fp32", "overhead"]
    only = [word for pattern in patterns for word in ("--only", pattern)]
    assert main(["cpu", "--dry-run", "--out", str(tmp_path / "results"), "--work", str(tmp_path), *only]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all("ratio" in line for line in lines[:-1])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("argv", "error"),
    [(["cpu", "--only", "nothing"], "--only nothing: choose of unet-bf16"), (["cpu", "--repeat", "0"], "--repeat 0")],
)
def test_invalid_flags_are_refused(argv, error):
    with pytest.raises(ValueError, match=error):
        main(argv)
