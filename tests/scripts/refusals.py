"""Helpers: a script refuses in one line with exit code 2, and its help imports nothing heavy."""

import subprocess
import sys
from pathlib import Path

from ldm.cli import run_command


def refused(main, argv, capsys) -> str:
    """The one line that a script ends with, exit code 2."""
    try:
        code = run_command(main, argv)
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (code, err)
    return err


def help_without_heavy_imports(script: Path, folder: Path) -> str:
    """Output of `--help` in another folder and an isolated interpreter, which must not import heavy modules."""
    code = (
        "import runpy, sys; sys.argv = [sys.orig_argv[-2], '--help']\n"
        "try: runpy.run_path(sys.orig_argv[-2], run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    print('code', stop.code, [m for m in ('torch', 'omegaconf', 'numpy') if m in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-I", "-c", code, str(script), ""], cwd=folder, capture_output=True, text=True
    )
    assert shown.stdout.strip().endswith("code 0 []"), shown.stderr
    return shown.stdout
