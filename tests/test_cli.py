"""Exact flags, one-line errors and exit codes of all command lines; paths from any folder."""

import gc
import importlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import weakref

import pytest
from tqdm import tqdm

from ldm import cli
from ldm.cli import EXIT_INTERRUPTED, EXIT_USAGE, Parser, TerminalHandler, collector_off, less_memory, run_command
from ldm.paths import ROOT, find_file, in_checkout


def parser() -> Parser:
    parser = Parser(prog="x")
    parser.add_argument("--ddim_steps", type=int, default=50, help="steps")
    parser.add_argument("--from-file")
    parser.add_argument("--H", type=int)
    return parser


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--ddim_step", "3"], "unknown flag --ddim_step; did you mean --ddim_steps?"),
        (["--ddim-steps=3"], "did you mean --ddim_steps?"),
        (["--from_file", "a"], "did you mean --from-file?"),
        (["--h", "3"], "did you mean --H?"),
        (["--zzzzzz"], "unknown flag --zzzzzz (--help lists the flags)"),
        (["word"], "unexpected argument 'word'; quote"),
        (["--from-file", "a", __file__], "a flag takes one path; does a pattern with * match several?"),
        (["--ddim_steps", "many"], "argument --ddim_steps: invalid int value: 'many'"),
    ],
)
def test_an_unknown_flag_is_one_line_with_the_nearest(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(argv)
    out, err = capsys.readouterr()
    assert (
        stop.value.code == EXIT_USAGE
        and out == ""
        and words in err
        and err.startswith("error: ")
        and err.count("\n") == 1
    )


def test_an_open_progress_bar_is_closed_before_the_error(capsys):
    def main(argv):
        bar = tqdm(total=5, desc="sampling", file=sys.stderr)
        bar.update()
        raise ValueError("no more")

    assert run_command(main, []) == EXIT_USAGE
    assert capsys.readouterr().err.endswith("\nerror: no more\n")


def test_typed_flags_come_without_defaults():
    some = parser()
    some.add_argument("--allow-targets", action="append", default=[])
    assert some.typed(["--H", "3", "--allow-targets", "a"]) == {"H": 3, "allow_targets": ["a"]}
    assert some.parse_args([]).ddim_steps == 50


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["--help"])
    assert stop.value.code == 0 and "steps (default: 50)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, words",
    [
        (ValueError("two\nlines"), "two lines"),
        (FileNotFoundError(2, "No such file or directory", "a.ckpt"), "a.ckpt: No such file or directory"),
        (OSError("disk is full"), "disk is full"),
        (ImportError("needs sklearn"), "needs sklearn"),
        (MemoryError(), "MemoryError"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "CUDA out of memory"),
        (
            RuntimeError("[enforce fail at alloc.cpp] DefaultCPUAllocator: no memory"),
            "no memory; try: smaller images",
        ),
    ],
)
def test_errors_that_the_user_can_fix_are_one_line_and_exit_code_2(error, words, capsys):
    def fail(argv):
        raise error

    assert run_command(fail, [], parser) == EXIT_USAGE
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
    with pytest.raises(type(error)):
        run_command(fail, ["--debug"])


@pytest.mark.parametrize("script", ["txt2img", "img2img", "knn2img", "inpaint", "sample_diffusion", "upscale"])
def test_advice_against_too_little_memory_names_only_flags_of_the_script(script):
    flags = importlib.import_module(f"scripts.{script}").parser().flags
    advice = less_memory(flags)
    assert "--precision bf16" in advice and set(re.findall(r"--\w+", advice)) <= set(flags)
    assert ("--n_samples 1" in advice) == (
        script in ("txt2img", "img2img", "knn2img")
    )  # in sample_diffusion it is the total
    assert ("--batch_size 1" in advice) == (script == "sample_diffusion") and less_memory(["--debug"]) == ""


def test_a_bug_shows_its_traceback():
    def fail(argv):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_command(fail, [])


def test_done_is_0_and_ctrl_c_is_130(capsys):
    def stop(argv):
        raise KeyboardInterrupt

    assert run_command(lambda argv: None, []) == 0 and run_command(stop, []) == EXIT_INTERRUPTED


@pytest.mark.parametrize(
    "ending, code", [("return 0", 0), ("return 3", 3), ("raise ValueError('bad')", 2), ("raise KeyError", 1)]
)
def test_a_program_ends_with_its_output_and_what_is_registered(ending, code):
    program = f"""
import atexit, sys
from ldm.cli import run_command
atexit.register(print, "registered")
def main(argv):
    sys.stdout.write("output ")
    {ending}
sys.exit(run_command(main))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "output registered\n")


def test_the_end_waits_for_other_threads():
    program = """
import threading, time
from ldm.cli import run_command
def work():
    time.sleep(0.1)
    print("done")
run_command(lambda argv: threading.Thread(target=work).start())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_the_collector_is_off_within_the_block_and_then_as_before():
    before = gc.isenabled()
    try:
        for enabled in (True, False):
            (gc.enable if enabled else gc.disable)()
            with pytest.raises(KeyError), collector_off():
                assert not gc.isenabled()
                raise KeyError
            assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_garbage_of_a_later_block_is_collected(monkeypatch):
    monkeypatch.setattr(cli, "only_samples", True)
    try:
        for _ in range(2):
            with collector_off():
                cycle = threading.Event()
                cycle.itself, found = cycle, weakref.ref(cycle)
                del cycle
        gc.collect()
        assert gc.get_freeze_count() and found() is None
    finally:
        gc.unfreeze()


def test_a_program_may_close_its_output():
    program = "import sys; from ldm.cli import run_command; sys.exit(run_command(lambda argv: sys.stdout.close()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_files_are_found_here_or_in_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        find_file("configs/stable-diffusion/v1-inference.yaml") == ROOT / "configs/stable-diffusion/v1-inference.yaml"
    )
    (tmp_path / "setup.py").touch()
    assert str(find_file("setup.py")) == "setup.py" and str(find_file("nowhere.ckpt")) == "nowhere.ckpt"
    assert in_checkout(ROOT / "configs" / "a.yaml") == "configs/a.yaml" and in_checkout("b/c.ckpt") == "b/c.ckpt"


def test_overrides_stand_anywhere_among_the_flags(capsys):
    parser = Parser(takes_overrides=True)
    parser.add_argument("-n", type=int)
    opt = parser.parse_args(["a.b=1", "-n", "3", "+a.c=x y"])
    assert (opt.n, opt.overrides) == (3, ["a.b=1", "+a.c=x y"])
    for words, message in (
        (["a=1"], "unexpected argument 'a=1'"),
        (["--m", "a.b=1"], "unknown flag --m"),
        (["-n=1.5"], "invalid int"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert message in capsys.readouterr().err


def test_a_home_directory_is_expanded_in_path_flags_only(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = Parser()
    parser.add_argument("--outdir", metavar="DIR")
    parser.add_argument("--init-img", nargs="+", metavar="FILE")
    parser.add_argument("--depth", metavar="FILE|DIR")
    parser.add_argument("--prompt")
    words = ["--outdir=~/pics", "--init-img", "~/a.png", "b.png", "--depth=~/d.png", "--prompt", "~/tilde"]
    opt = parser.parse_args(words)
    assert (opt.outdir, opt.init_img, opt.prompt) == ("/home/me/pics", ["/home/me/a.png", "b.png"], "~/tilde")
    assert opt.depth == "/home/me/d.png"


def test_an_empty_path_is_refused(capsys):
    words = parser()
    words.add_argument("--outdir", metavar="DIR")
    words.add_argument("--lora", metavar="FILE[:STRENGTH]", action="append")
    for given in (["--outdir="], ["--lora", ""], ["--lora", "a", "--lora="]):
        with pytest.raises(SystemExit):
            words.parse_args(given)
        assert f"{given[0].rstrip('=')} '': expected a path" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_logs_whatever_its_parent_does_with_progress_bars(capfd):
    line = logging.LogRecord("ldm", logging.INFO, "", 0, "a line of the fork", (), None)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with tqdm.get_lock():
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    pid = os.fork()
    if not pid:
        signal.alarm(20)  # ends a process that waits for the lock
        TerminalHandler().emit(line)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    done.set()
    thread.join()
    assert code == 0
    assert "a line of the fork" in capfd.readouterr().err


def test_torch_logs_no_statistics_after_an_interrupted_import():
    level = "logging.getLogger('torch').getEffectiveLevel()"
    code = f"import logging; from ldm.cli import run_command; run_command(lambda argv: print({level}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == f"{logging.WARNING}\n", result.stderr
