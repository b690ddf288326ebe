"""Shared by all command lines: exact flags, one-line errors, log lines that keep a progress bar intact."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import io
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ldm.atomic import is_out_of_memory
from ldm.config.suggest import closest
from ldm.machine.allocator import share_freed_memory
from ldm.machine.cores import share_cores

only_samples = False
"""True in a program that trains nothing, such as scripts/txt2img.py: `ldm.models` then needs no Lightning."""

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
# dotted.path=value; + adds a new key, ~dotted.path deletes one
_OVERRIDE = re.compile(r"\+?[A-Za-z_]\w*(\.[\w-]+)+=|~[A-Za-z_]\w*(\.[\w-]+)+$", re.ASCII)
_PATHS = (
    "DIR",
    "FILE",
    "FILE|DIR",
    "FILE[:STRENGTH]",
    "FILE[:TOKEN]",
    "FOLDER",
    "IMAGE",
    "NAME|DIR",
    "PATH",
    "PNG",
    "YAML",
)  # metavars of paths


class Stopped(BaseException):
    """Raised when a signal stops a run; `exit_code` is that of the process, 128 + the signal's number.

    checkpoint: the state that was saved for it, if any. A BaseException, so that handlers of errors do not catch it.
    """

    def __init__(self, name: str, checkpoint: Path | None = None) -> None:
        super().__init__(name)
        self.reason = "Ctrl-C" if name == "SIGINT" else name
        self.exit_code, self.checkpoint = STOPS[name], checkpoint


STOPS = {"SIGHUP": 129, "SIGTERM": 143, "SIGINT": EXIT_INTERRUPTED}  # signals that stop a run, and its exit codes


def handle_signals(handlers: Mapping[str, Any]) -> dict[int, Any]:
    """Install handlers of signals by name -> the former ones by number; none outside of the main thread.

    SIGHUP stays ignored if it is, as under nohup. After a hangup there is no terminal to write to: output is dropped.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    terminals = [number for number in (1, 2) if os.isatty(number)]
    previous: dict[int, Any] = {}
    for name, handler in handlers.items():
        number = getattr(signal, name, None)  # Windows has few
        if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
            continue
        if name == "SIGHUP":

            def hang_up(number: int, frame: Any, handler: Any = handler) -> None:
                for terminal in terminals:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
                handler(number, frame)

            previous[number] = signal.signal(number, hang_up)
        else:
            previous[number] = signal.signal(number, handler)
    return previous


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise Stopped within the block on SIGTERM, SIGHUP and SIGINT; restore the former handlers afterwards."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(signal.Signals(number).name)

    previous = handle_signals(dict.fromkeys(STOPS, stop))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def default_signals() -> Iterator[None]:
    """Let SIGTERM, SIGHUP and Ctrl-C end the process within the block, which waits where Python handles no signal."""
    previous = handle_signals({name: signal.SIG_DFL for name in STOPS if name != "SIGHUP"})
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations and with one-line errors; for an unknown flag they suggest the nearest one.

    takes_overrides: collect words such as model.params.key=value, anywhere among the flags, in the list `overrides`.
    advice: {flag without dashes: what to do instead} for flags that do not exist on purpose.
    """

    def __init__(self, takes_overrides: bool = False, advice: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.takes_overrides, self.advice = takes_overrides, advice or {}

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        overrides = [word for word in words if self.takes_overrides and _OVERRIDE.match(word)]
        self._words = [word for word in words if word not in overrides]
        parsed, extra = self.parse_known_args(self._words, namespace)
        if extra:
            self.error(self._unknown(extra[0]))
        for action in self._actions:
            if action.metavar in _PATHS and hasattr(parsed, action.dest):
                value = _expand_user(getattr(parsed, action.dest))
                if "" in (value if isinstance(value, list) else [value]):
                    self.error(f"{action.option_strings[-1]} '': expected a path; the working directory is .")
                setattr(parsed, action.dest, value)
        if self.takes_overrides:
            parsed.overrides = overrides
        return parsed

    @property
    def flags(self) -> list[str]:
        """Every spelling of every flag that --help shows."""
        return [flag for action in self._actions if action.help != argparse.SUPPRESS for flag in action.option_strings]

    def typed(self, args: Sequence[str]) -> dict[str, Any]:
        """Return the values of the flags on a command line, without defaults."""
        defaults = [(action, action.default) for action in self._actions]
        try:
            for action, _ in defaults:
                action.default = argparse.SUPPRESS
            return vars(self.parse_args(args))
        finally:
            for action, default in defaults:
                action.default = default

    def error(self, message: str) -> NoReturn:
        if "are required" in message:  # a required flag may be misspelt
            unknown = [word for word in self._words if word.startswith("--") and word.split("=")[0] not in self.flags]
            message = self._unknown(unknown[0]) if unknown else message
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)

    def _unknown(self, word: str) -> str:
        flag, _, value = word.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if not flag.startswith("-"):
            override = ", or write overrides as model.params.key=value" if self.takes_overrides else ""
            if os.path.exists(word):  # of a pattern that the shell expanded
                return f"unexpected argument {word!r}: a flag takes one path; does a pattern with * match several?"
            return f"unexpected argument {word!r}; quote a value with spaces{override} (--help lists the flags)"
        if name in self.advice:
            return f"{flag}: {self.advice[name]}"
        if self.takes_overrides and "." in name:
            return f"unknown flag {flag}; an override has no dashes: {flag.lstrip('-')}={value or 'VALUE'}"
        same = {option.lstrip("-").replace("-", "_").lower(): option for option in self.flags}
        near = same.get(name.lower()) or closest(flag, self.flags)
        return f"unknown flag {flag}" + (f"; did you mean {near}?" if near else "") + " (--help lists the flags)"


def _expand_user(value: Any) -> Any:
    """Replace `~` at the beginning of a path or of each of a list of paths: the shell leaves it in --flag=~/x."""
    if isinstance(value, list):
        return [_expand_user(each) for each in value]
    return type(value)(os.path.expanduser(value)) if isinstance(value, (str, Path)) else value


class _HelpFormatter(argparse.HelpFormatter):
    """Help that shows the default of every flag that has one, and keeps the line breaks of texts."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.default or action.default == argparse.SUPPRESS or "default" in text:
            return text
        return f"{text} (default: %(default)s)"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class TerminalHandler(logging.Handler):
    """Log lines on stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")  # without it there is no bar
        write = print if tqdm is None else tqdm.tqdm.write
        with contextlib.suppress(OSError):  # the terminal or the reader of a pipe is gone: the work goes on
            write(self.format(record), file=sys.stderr)


def _own_lock() -> None:
    """Give a forked process a lock of its own for progress bars.

    tqdm shares one with its forks: a data worker that is killed while it logs would block its parent.
    """
    if tqdm := sys.modules.get("tqdm"):
        tqdm.tqdm.set_lock(threading.RLock())


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_own_lock)


# Advice for too little memory, by flag. `--n_samples` is a batch size only in scripts without `--batch_size`.
_LESS_MEMORY = {
    "--batch_size": "a smaller batch (--batch_size 1)",
    "--n_samples": "a smaller batch (--n_samples 1)",
    "--H": "smaller images (--H, --W)",
    "--tiled": "tiled decoding (--tiled)",
    "--tile": "smaller tiles (--tile 64)",
    "--offload": "idle stages on the CPU (--offload all, with CUDA)",
    "--precision": "16-bit weights (--precision bf16)",
}


def run_command(
    main: Callable[[Sequence[str]], int | None],
    argv: Sequence[str] | None = None,
    parser: Callable[[], Parser] | None = None,
) -> int:
    """Call `main(argv)`, log to the terminal, and print errors that the user can fix as one line; return the exit code.

    argv: None means the command line of this process, which then trains nothing (`only_samples`).

    0: done; 2: such an error (ValueError, OSError, a missing package, out of memory); 130: Ctrl-C.
    With `--debug` on the command line, errors show their traceback. parser: returns main's parser, for advice on flags.
    """
    global only_samples
    own_process = argv is None
    if own_process:
        only_samples = True
        share_freed_memory()
        share_cores()
        exit_at_once()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[TerminalHandler()])
        for chatty in ("httpx", "PIL", "fsspec", "huggingface_hub", "torch.utils._pytree"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
        # torch sets this level at the end of its import; after a Ctrl-C within, it would log statistics at exit.
        logging.getLogger("torch").setLevel(logging.WARNING)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names that the terminal's encoding lacks
    code = _exit_code(main, argv, parser)
    if own_process and code == 0:
        leave()
    return code


def _exit_code(
    main: Callable[[Sequence[str]], int | None], argv: Sequence[str], parser: Callable[[], Parser] | None
) -> int:
    try:
        return main(argv) or 0
    except KeyboardInterrupt:
        _close_bars()
        print("stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        out_of_memory = is_out_of_memory(error)
        if "--debug" in argv or not (out_of_memory or isinstance(error, (ValueError, OSError, ImportError))):
            raise
        _close_bars()
        advice = less_memory(parser().flags) if out_of_memory and parser is not None else ""
        print(f"error: {one_line(error)}{advice}", file=sys.stderr)
        return EXIT_USAGE


def exit_at_once() -> None:
    """Let the end of the process not look for cycles in all of torch, which takes seconds."""
    atexit.register(gc.freeze)


def leave() -> None:
    """End the process with code 0 without running destructors: those of torch and the model take a third of a second.

    Functions registered with atexit run. Return if other threads still work, or if output is lost, which is then
    reported as the interpreter ends the process.
    """
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        return
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
    with contextlib.suppress(OSError, ValueError):  # ValueError: a stream is closed
        for stream in streams:
            stream.flush()
        atexit._run_exitfuncs()
        for stream in streams:
            stream.flush()
        os._exit(0)


@contextmanager
def collector_off() -> Iterator[None]:
    """Import or build within the block without the garbage collector, which takes a fifth of the time.

    Imports make a million objects that stay, and it would look through them again and again: in a program that only
    samples, never.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if only_samples and "torch" in sys.modules and not gc.get_freeze_count():  # once: garbage freezes too
            gc.freeze()
        if enabled:
            gc.enable()


def _close_bars() -> None:
    """End the lines of open progress bars, so that a message begins its own."""
    if tqdm := sys.modules.get("tqdm"):
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()


def less_memory(flags: Sequence[str]) -> str:
    """Return advice for too little memory that names only the script's own `flags`; '' if none of them helps."""
    known = [flag for flag in _LESS_MEMORY if flag in flags and not (flag == "--n_samples" and "--batch_size" in flags)]
    return f"; try: {', '.join(_LESS_MEMORY[flag] for flag in known)}" if known else ""


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number and its noun: 1 batch, 2,000 batches. many: the plural, if it is not `one` and an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks; system errors name their file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def import_lightning() -> ModuleType:
    """Import pytorch_lightning; raise ImportError with advice if it fails on an incompatible torchvision.

    Lightning imports torchvision, if installed, through torchmetrics.
    """
    try:
        with collector_off():
            import pytorch_lightning  # heavy: kept out of --help and of the checks of flags
    except Exception as error:
        if "torchvision" not in "".join(traceback.format_exception(error)):
            raise
        raise ImportError(
            f"torchvision does not match this torch ({one_line(error)}): pip install --upgrade torch torchvision, "
            "or pip uninstall torchvision (only retrieval needs it)"
        ) from error
    return pytorch_lightning
