"""What the command lines share: flags that are never guessed, errors in one line, paths that work from any folder."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ldm.config.suggest import closest

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
_OVERRIDE = re.compile(r"\+?\w+(\.\w+)+=")
_NO_MEMORY = ("OutOfMemoryError", "DefaultCPUAllocator: ")  # of a GPU, by its class; of the CPU, a RuntimeError


class Parser(argparse.ArgumentParser):
    """argparse that takes no abbreviations, names the nearest flag for an unknown one, and reports an error in one line.

    takes_overrides: words such as model.params.key=value, anywhere among the flags, become the list `overrides`.
    """

    def __init__(self, takes_overrides: bool = False, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.takes_overrides = takes_overrides

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        self._words = list(sys.argv[1:] if args is None else args)
        parsed, extra = self.parse_known_args(args, namespace)
        if self.takes_overrides:
            parsed.overrides = [word for word in extra if _OVERRIDE.match(word)]
            extra = [word for word in extra if word not in parsed.overrides]
        if extra:
            self.error(self._unknown(extra[0]))
        return parsed

    @property
    def flags(self) -> list[str]:
        """Every spelling of every flag."""
        return [option for action in self._actions for option in action.option_strings]

    def typed(self, args: Sequence[str]) -> dict[str, Any]:
        """The values of the flags that stand on a command line, none that are only defaults."""
        defaults = [(action, action.default) for action in self._actions]
        try:
            for action, _ in defaults:
                action.default = argparse.SUPPRESS
            return vars(self.parse_args(args))
        finally:
            for action, default in defaults:
                action.default = default

    def error(self, message: str) -> NoReturn:
        if "are required" in message:  # one of them may be there, misspelt
            unknown = [word for word in self._words if word.startswith("--") and word.split("=")[0] not in self.flags]
            message = self._unknown(unknown[0]) if unknown else message
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)

    def _unknown(self, word: str) -> str:
        flag = word.split("=")[0]
        if not flag.startswith("-"):
            return f"unexpected argument {word!r}; put quotes around a value that holds spaces (--help lists the flags)"
        flags = self.flags
        same = {option.lstrip("-").replace("-", "_").lower(): option for option in flags}
        plain = flag.lstrip("-").replace("-", "_").lower()
        near = same.get(plain) or closest(flag, flags)
        return f"unknown flag {flag}" + (f"; did you mean {near}?" if near else "") + " (--help lists the flags)"


class _HelpFormatter(argparse.HelpFormatter):
    """Help with the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.default or action.default == argparse.SUPPRESS or "%(default)" in text or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class _TerminalHandler(logging.StreamHandler):
    """Log lines on stderr, above a progress bar where one is running."""

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" not in sys.modules:
            super().emit(record)
            return
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


# What takes less memory, by the flag that a script has for it; `--n_samples` is how many are drawn at once only where no batch size is.
_LESS_MEMORY = {
    "--batch_size": "fewer pictures at once (--batch_size 1)",
    "--n_samples": "fewer pictures at once (--n_samples 1)",
    "--H": "smaller pictures (--H, --W)",
    "--tiled": "decoding in tiles (--tiled)",
    "--tile": "smaller tiles (--tile 64)",
    "--precision": "16-bit weights (--precision bf16)",
}


def run_command(
    main: Callable[[Sequence[str]], int | None],
    argv: Sequence[str] | None = None,
    parser: Callable[[], Parser] | None = None,
) -> int:
    """Call `main(argv)`, send log lines to the terminal, and turn errors meant for the user into one line -> exit code.

    0 done, 2 for what the user can mend (ValueError, OSError, a missing package, too little memory), 130 after Ctrl-C.
    `--debug` on the command line shows the traceback instead. parser: makes main's, whose flags advice may name.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_TerminalHandler()])
        for chatty in ("httpx", "PIL", "fsspec", "huggingface_hub"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        return main(argv) or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        out_of_memory = isinstance(error, MemoryError) or any(
            words in f"{type(error).__name__} {error}" for words in _NO_MEMORY
        )
        if "--debug" in argv or not (out_of_memory or isinstance(error, (ValueError, OSError, ImportError))):
            raise
        advice = less_memory(parser().flags) if out_of_memory and parser is not None else ""
        print(f"error: {one_line(error)}{advice}", file=sys.stderr)
        return EXIT_USAGE


def less_memory(flags: Sequence[str]) -> str:
    """What may help where memory runs out, by the flags that a script has; nothing where it has none of them."""
    known = [flag for flag in _LESS_MEMORY if flag in flags and not (flag == "--n_samples" and "--batch_size" in flags)]
    return f"; try: {', '.join(_LESS_MEMORY[flag] for flag in known)}" if known else ""


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks; system errors name their file."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
