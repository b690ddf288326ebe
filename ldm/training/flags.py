"""The command line of main.py: its own flags, every flag of the Trainer's signature, and dotted overrides."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ldm.config.signature import argument_help, constructor_arguments
from ldm.config.suggest import closest
from ldm.config.trainer_keys import REMOVED_SETTINGS, TRAINER, TRANSLATED, UNSUPPORTED

DEFAULT_SEED = 23

# An override is a dotted path, '=' and a value; '+' adds a key that the config does not have.
_OVERRIDE = re.compile(r"\+?[A-Za-z_]\w*(\.[\w-]+)+=", re.ASCII)

EPILOG = """\
dotted overrides stand anywhere:  model.params.image_size=32  data.params.batch_size=4  model.params.ddconfig.ch_mult=[1,2,4]
with a + a key is new, where any may be:  +lightning.callbacks.timer.target=pytorch_lightning.callbacks.Timer

exit codes: 0 done; 1 an exception in training (checkpoints/crash.ckpt holds the state); 2 a mistake in flags, configs or
files; 130 stopped by Ctrl-C and 143 by SIGTERM, both with checkpoints/last.ckpt saved at the end of the step.
SIGUSR1 saves last.ckpt and goes on; SIGUSR2 opens a debugger.
"""


class UsageError(ValueError):
    """A command line that cannot be used; the message is one line with the value and the choices."""


@dataclass(frozen=True)
class Options:
    """What the command line asked for; `trainer` holds the Trainer's flags that were given, and no others."""

    name: str = ""
    resume: str | None = None
    base: tuple[str, ...] = ()
    train: bool = False
    no_test: bool = False
    project: str = ""
    debug: bool = False
    seed: int | None = None
    postfix: str = ""
    logdir: str = "logs"
    scale_lr: bool | None = None
    allow_targets: tuple[str, ...] = ()
    trainer: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()


def parse(argv: list[str]) -> Options:
    """Options from a command line; raises UsageError for anything misspelt, with the nearest flag."""
    overrides = tuple(word for word in argv if _OVERRIDE.match(word))
    parser = _parser()
    known, unknown = parser.parse_known_args([word for word in argv if not _OVERRIDE.match(word)])
    if unknown:
        raise UsageError(_about_unknown(unknown[0], parser))
    values = vars(known)
    own = {key: values.pop(key) for key in list(values) if key in Options.__dataclass_fields__}
    for key in ("base", "allow_targets"):
        own[key] = tuple(own.get(key) or ())
    if own.get("name") and own.get("resume"):
        raise UsageError("--name and --resume: a resumed run goes on in its own folder, so give one of them")
    if own.get("postfix") and own.get("resume"):
        raise UsageError("--postfix and --resume: a resumed run goes on in its own folder, so give one of them")
    if not (own["base"] or own.get("resume")):
        raise UsageError("nothing to build: give --base CONFIG.yaml (and -t to train), or --resume RUN_FOLDER")
    return Options(**own, trainer=values, overrides=overrides)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="main.py",
        description="Train a model that YAML files describe.",
        epilog=EPILOG,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what was not given is absent, so that only explicit flags are passed on
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="main.py --base CONFIG.yaml [CONFIG.yaml ...] [-t] [--gpus 0,1] [flags] [model.params.key=value ...]",
    )
    boolean = {"nargs": "?", "const": True, "type": _bool, "metavar": "BOOL"}
    add = parser.add_argument
    add("-n", "--name", nargs="?", const="", help="stands after the time in the name of the run folder")
    add(
        "-r",
        "--resume",
        metavar="PATH",
        help="go on with a run: its folder (checkpoints/last.ckpt), or a checkpoint in it",
    )
    add("-b", "--base", nargs="*", action="extend", metavar="YAML", help="configs, merged left to right")
    add("-t", "--train", **boolean, help="train")
    add("--no-test", **boolean, help="don't run the test set after training")
    add("-p", "--project", metavar="NAME", help="folder between the log folder and the run folder")
    add("-d", "--debug", **boolean, help="show tracebacks, open a debugger on an error, keep the run under debug_runs/")
    add("-s", "--seed", type=int, metavar="N", help=f"seed of weights, noise and data order ({DEFAULT_SEED})")
    add("-f", "--postfix", metavar="TEXT", help="ends the name of the run folder")
    add("-l", "--logdir", metavar="DIR", help="where run folders are made (logs)")
    text = "scale the base learning rate by accumulation x devices x batch size (true)"
    add("--scale_lr", **boolean, help=text)
    add(
        "--allow-targets",
        action="append",
        metavar="PACKAGE",
        help="let configs name classes of this package too; may be repeated",
    )
    _add_trainer_flags(parser)
    return parser


def _add_trainer_flags(parser: argparse.ArgumentParser) -> None:
    arguments, texts = constructor_arguments(TRAINER) or {}, argument_help(TRAINER)
    group = parser.add_argument_group("flags of Lightning's Trainer")
    for name, argument in arguments.items():
        if name in UNSUPPORTED:
            continue
        kinds = _kinds(argument.annotation)
        may_be_bare = {"nargs": "?", "const": True} if "bool" in kinds else {}
        text = texts.get(name, "").replace("%", "%%")
        group.add_argument(f"--{name}", type=_reader(kinds), metavar="|".join(kinds).upper(), help=text, **may_be_bare)
    group = parser.add_argument_group("published names of such flags (Lightning 1.4)")
    for name, text in TRANSLATED.items():
        group.add_argument(f"--{name}", type=_scalar if name != "gpus" else str, metavar="VALUE", help=text)
    for name in REMOVED_SETTINGS:
        group.add_argument(f"--{name}", nargs="?", const=True, type=_scalar, help=argparse.SUPPRESS)


def _kinds(annotation: str) -> tuple[str, ...]:
    words = re.findall(r"\w+", re.sub(r"dict\[.*?\]", "", annotation))
    kinds = [kind for kind in ("bool", "int", "float") if kind in words and f"list[{kind}]" not in annotation]
    textual = {"str", "_PRECISION_INPUT", "_LITERAL_WARN", "Strategy", "Accelerator"}
    return tuple(kinds + (["str"] if textual & set(words) or not kinds else []))


def _reader(kinds: tuple[str, ...]) -> Any:
    """argparse type for a Trainer argument: the first of its kinds that the text reads as; None for 'none'."""

    def read(text: str) -> Any:
        if text.lower() in ("none", "null"):
            return None
        for kind in kinds:
            try:
                return {"bool": _bool if kinds == ("bool",) else _word_bool, "int": int, "float": float, "str": str}[
                    kind
                ](text)
            except (ValueError, argparse.ArgumentTypeError):
                continue
        raise argparse.ArgumentTypeError(f"expected {' or '.join(kinds)}, got {text!r}")

    return read


def _bool(text: str) -> bool:
    words = {
        "true": True,
        "yes": True,
        "t": True,
        "y": True,
        "1": True,
        "false": False,
        "no": False,
        "f": False,
        "n": False,
        "0": False,
    }
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return words[text.lower()]


def _word_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def _scalar(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None if text.lower() in ("none", "null") else text


def _about_unknown(word: str, parser: argparse.ArgumentParser) -> str:
    if not word.startswith("-"):
        return f"{word!r} is not a flag's value, nor an override such as model.params.key=value"
    flag, _, value = word.partition("=")
    name = flag.lstrip("-").replace("-", "_")
    if name in UNSUPPORTED:
        return f"{flag}: {UNSUPPORTED[name]}"
    if "." in name:
        return f"unknown flag {flag}; an override has no dashes: {flag.lstrip('-')}={value or 'VALUE'}"
    flags = [flag for action in parser._actions for flag in action.option_strings if action.help != argparse.SUPPRESS]
    near = closest("--" + name, flags) or closest(flag, flags, cutoff=0.0)
    return f"unknown flag {flag}; did you mean {near}? (--help lists all)"
