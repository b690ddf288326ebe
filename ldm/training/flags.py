"""The command line of main.py: its own flags, every argument of the Trainer as a flag, and dotted overrides."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ldm.cli import Parser
from ldm.config.signature import argument_help, constructor_arguments
from ldm.config.trainer_keys import COMPILERS, REMOVED_SETTINGS, TRAINER, TRANSLATED, UNSUPPORTED
from ldm.config.types import convert

DEFAULT_SEED = 23

EPILOG = """\
dotted overrides, anywhere:  model.params.image_size=32  data.params.batch_size=4  model.params.ddconfig.ch_mult=[1,2,4]
+ adds a new key, where keys are free:  +lightning.callbacks.timer.target=pytorch_lightning.callbacks.Timer
~ deletes a key:  ~model.params.cond_stage_config.params

exit codes: 0 done; 1 training failed (checkpoints/crash.ckpt holds the state); 2 invalid flags, configs or files;
130 stopped by Ctrl-C, 143 by SIGTERM and 129 by SIGHUP, with checkpoints/last.ckpt saved at the end of the step.
SIGUSR1 saves last.ckpt and training continues; SIGUSR2 opens a debugger.
"""


@dataclass(frozen=True)
class RunOptions:
    """A parsed command line; `trainer` holds only the Trainer flags that were given."""

    name: str = ""
    resume: str | None = None
    base: tuple[str, ...] = ()
    train: bool = False
    doctor: bool = False
    no_test: bool = False
    project: str = ""
    debug: bool = False
    seed: int | None = None
    postfix: str = ""
    logdir: str = "logs"
    scale_lr: bool | None = None
    compile: str | None = None
    strict_data: bool = False
    allow_targets: tuple[str, ...] = ()
    allow_pipe: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()


def parse(argv: Sequence[str] | None = None) -> RunOptions:
    """Parse a command line; exit with code 2 and one line on stderr if it is invalid."""
    parser = _parser()
    given: dict[str, Any] = vars(parser.parse_args(argv))
    own: dict[str, Any] = {each.name: given.pop(each.name) for each in fields(RunOptions) if each.name in given}
    lists = {name: tuple(value) for name, value in own.items() if isinstance(value, list)}
    options = RunOptions(**own | lists, trainer=given)
    for name in ("name", "postfix"):
        if options.resume and own.get(name):
            parser.error(f"--{name} and --resume: a resumed run stays in its own directory, so give only one of them")
    if not (options.base or options.resume):
        parser.error("nothing to build: give --base CONFIG.yaml (and -t to train), or --resume RUN_DIRECTORY")
    return options


def _parser() -> Parser:
    parser = Parser(
        takes_overrides=True,
        advice=UNSUPPORTED,
        prog="main.py",
        description="Train a model described by YAML files.",
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,  # RunOptions has the defaults
        usage="main.py --base CONFIG.yaml [CONFIG.yaml ...] [-t] [--gpus 0,1] [flags] [model.params.key=value ...]",
    )
    boolean: dict[str, Any] = {"nargs": "?", "const": True, "type": _reader(("bool",)), "metavar": "BOOL"}
    add = parser.add_argument
    add("-n", "--name", nargs="?", const="", help="follows the time in the name of the run directory")
    text = "continue a run: its directory (checkpoints/last.ckpt) or a checkpoint in it"
    add("-r", "--resume", metavar="PATH", help=text)
    add("-b", "--base", nargs="*", action="extend", metavar="YAML", help="configs, merged left to right")
    add("-t", "--train", **boolean, help="train")
    text = "examine the run without starting it: its costs, problems and notes; exit code 2 if there is a problem"
    add("--doctor", **boolean, help=text)
    add("--no-test", **boolean, help="skip the test set after training")
    add("-p", "--project", metavar="NAME", help="folder between the log folder and the run directory")
    add("-d", "--debug", **boolean, help="show tracebacks, open a debugger on errors, put the run under debug_runs/")
    add("-s", "--seed", type=int, metavar="N", help=f"seed of weights, noise and data order (default: {DEFAULT_SEED})")
    add("-f", "--postfix", metavar="TEXT", help="end of the name of the run directory")
    add("-l", "--logdir", metavar="DIR", help=f"folder of the run directories (default: {RunOptions.logdir})")
    text = "multiply the base learning rate by accumulation x devices x batch size (default: true)"
    add("--scale_lr", **boolean, help=text)
    text = f"compile the denoising network with this backend of torch.compile (default of the flag: {COMPILERS[0]})"
    add("--compile", nargs="?", const=COMPILERS[0], choices=COMPILERS, metavar="BACKEND", help=text)
    add("--strict-data", **boolean, help="refuse to resume if the files, captions or classes of a dataset changed")
    text = "let configs name classes of this package too; may be repeated"
    add("--allow-targets", action="append", metavar="PACKAGE", help=text)
    text = "allow shards that a command writes (pipe:aws s3 cp ... -), and run it"
    add("--allow-pipe", **boolean, help=text)

    texts = argument_help(TRAINER)
    group = parser.add_argument_group("flags of Lightning's Trainer")
    for name, annotation in (constructor_arguments(TRAINER) or {}).items():
        if name not in UNSUPPORTED:
            kinds = _kinds(annotation)
            bare: dict[str, Any] = {"nargs": "?", "const": True} if "bool" in kinds else {}
            text = texts.get(name, "").replace("%", "%%")
            group.add_argument(f"--{name}", type=_reader(kinds), metavar="|".join(kinds).upper(), help=text, **bare)
    group = parser.add_argument_group("published names of such flags (Lightning 1.4)")
    scalar = _reader(("bool", "int", "float", "str"))
    for name, text in TRANSLATED.items():
        group.add_argument(f"--{name}", type=scalar if name != "gpus" else str, metavar="VALUE", help=text)
    for name in REMOVED_SETTINGS:
        group.add_argument(f"--{name}", nargs="?", const=True, type=scalar, help=argparse.SUPPRESS)
    return parser


def _kinds(annotation: str) -> tuple[str, ...]:
    """Return the types of a flag whose Trainer argument has this annotation: bool, int, float, str."""
    words = re.findall(r"\w+", re.sub(r"dict\[.*?\]", "", annotation))
    kinds = [kind for kind in ("bool", "int", "float") if kind in words and f"list[{kind}]" not in annotation]
    textual = {"str", "_PRECISION_INPUT", "_LITERAL_WARN", "Strategy", "Accelerator"}
    return tuple(kinds + (["str"] if textual & set(words) or not kinds else []))


def _reader(kinds: tuple[str, ...]) -> Callable[[str], Any]:
    """Return an argparse type: the first of `kinds` that fits the text, None for 'none'.

    Other words for booleans, such as 'yes' and '1', are read only if bool is the only kind.
    """
    booleans = {"true": True, "false": False} if "bool" in kinds else {}
    if kinds == ("bool",):
        booleans |= dict.fromkeys(("yes", "t", "y", "1"), True) | dict.fromkeys(("no", "f", "n", "0"), False)

    def read(text: str) -> Any:
        word = text.lower()
        if word in ("none", "null"):
            return None
        if word in booleans:
            return booleans[word]
        for kind in ("int", "float", "str"):
            if kind in kinds:
                with contextlib.suppress(ValueError):
                    return convert(text, kind)
        expected = "true or false" if kinds == ("bool",) else " or ".join(kinds)
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return read
