"""A picture drawn again: the command line that its metadata stands for, and whether the files are still those it was drawn with."""

from __future__ import annotations

import argparse
import logging
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.cli import Parser
from ldm.output.watermark import METHODS
from ldm.paths import fingerprint

if TYPE_CHECKING:
    from ldm.checkpoint import WeightsSource

logger = logging.getLogger(__name__)

# What the metadata calls it -> the flag's name among the parsed arguments.
FLAGS = {"steps": "ddim_steps", "eta": "ddim_eta", "channels": "C", "factor": "f", "height": "H", "width": "W"}
FLAGS |= {
    name: name for name in ("negative_prompt", "sampler", "spacing", "scale", "guidance_rescale", "dynamic_threshold")
}
FLAGS |= {
    name: name
    for name in (
        "seed",
        "seed_mode",
        "n_samples",
        "n_iter",
        "fixed_code",
        "tiled",
        "emphasis",
        "long_prompts",
        "chunks",
    )
}
FLAGS |= {name: name for name in ("strength", "init_img", "depth", "config", "ckpt", "use_ema", "device")}
FLAGS |= {name: name for name in ("use_neighbors", "n_repeat", "database", "knn", "searcher", "clip_weights")} | {
    "clip": "clip_type"
}
FLAGS["precision_used"] = "precision"  # `auto` may be another here
BELONGS_TO = {  # a flag on the command line -> what is then not taken from the metadata
    "sampler": ("eta", "spacing"),
    "plms": ("sampler", "eta", "spacing"),
    "dpm_solver": ("sampler", "eta", "spacing"),
    "config": ("channels", "factor"),
    "laion400m": ("config", "ckpt", "channels", "factor"),
}
MAX_COUNT = 1_000_000  # of prompts and pictures in a run
WHOLE_RUN = ("n_samples", "n_iter", "from_file")  # flags that ask for more than the one picture


class Recorded(NamedTuple):
    """A picture's metadata, and the names of the flags that replace it."""

    path: str
    info: Mapping[str, Any]
    typed: frozenset[str]

    @property
    def only(self) -> int | None:
        """The place of the picture in its run; None where the whole run is drawn: for a grid, and for flags of WHOLE_RUN."""
        return None if self.typed & set(WHOLE_RUN) else self.info.get("image_index")

    def prompts(self, prompt: str) -> str | list[str]:
        """Prompts that make batches of the sizes that the run had. Those of other pictures are not known and do not matter."""
        if self.typed & {*WHOLE_RUN, "prompt"} and self.only is None:
            return prompt
        count = self.info.get("n_prompts", 1)
        if count == 1 and self.info.get("batch_size") == self.info.get("n_samples"):
            return prompt
        return list(self.info["prompts"][:count]) if self.only is None and "prompts" in self.info else [prompt] * count


def add_redraw_flag(parser: Parser) -> None:
    text = "draw the picture in this PNG again, by its metadata; other flags replace what is written there, --n_samples, --n_iter and "
    text += "--from-file draw a whole run with its settings"
    parser.add_argument("--from-metadata", metavar="PNG", help=text)


def parse(make_parser: Callable[[], Parser], argv: Sequence[str], task: str) -> Namespace:
    """The command line; with --from-metadata the picture's settings in place of defaults, and `recorded` says what is known of it."""
    parser = make_parser()
    opt = parser.parse_args(argv)
    opt.recorded = None
    if not opt.from_metadata:
        return opt
    from ldm.output.images import read_metadata

    info, typed = read_metadata(opt.from_metadata), frozenset(parser.typed(argv))
    if info.get("task") != task:
        raise ValueError(
            f"--from-metadata {opt.from_metadata}: this picture was drawn by {info.get('task')}, not by {task}"
        )
    _check_types(opt.from_metadata, info, parser)
    skipped = {name for flag in typed for name in BELONGS_TO.get(flag, ())}
    for name, flag in FLAGS.items():
        known = name in info and (info[name] is not None or name not in ("config", "ckpt", "database"))
        if known and name not in skipped and flag not in typed and (hasattr(opt, flag) or name == "chunks"):
            setattr(opt, flag, info[name])
    if "prompt" not in typed:
        opt.prompt = info.get("prompt", (info.get("prompts") or [""])[0])
    if "watermark" in info and "watermark" not in typed:  # the safety check stays what this command line asks for
        words = str(info["watermark"] or "off").split(", ")
        opt.watermark = next((method for method in (*METHODS, "off") if method in words), None)
    opt.recorded = Recorded(opt.from_metadata, info, typed)
    if opt.recorded.only is not None and not opt.skip_save:
        opt.skip_grid = True  # of one picture
    if not getattr(opt, "long_prompts", False):
        opt.chunks = None
    return opt


def _check_types(path: str, info: Mapping[str, Any], parser: Parser) -> None:
    """ValueError where the metadata, which anybody can write, holds what the flag of that name would not take."""
    flags = {action.dest: action for action in parser._actions}
    wanted = {name: (_kind(flags[flag]), flags[flag].choices) for name, flag in FLAGS.items() if flag in flags}
    wanted |= {name: (int, range(MAX_COUNT)) for name in ("n_prompts", "batch_size", "image_index", "chunks")} | {
        "prompt": (str, None)
    }
    for name, (kind, choices) in wanted.items():
        value = info.get(name)
        right = isinstance(value, (int, float) if kind is float else kind) and (
            kind is bool or not isinstance(value, bool)
        )
        if value is not None and not (right and (choices is None or value in choices)):
            raise ValueError(f"--from-metadata {path}: its {name} is {str(value)[:60]!r}, which no run has written")
    prompts = info.get("prompts", [])
    if not (isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)):
        raise ValueError(f"--from-metadata {path}: its prompts are no list of texts")


def _kind(action: argparse.Action) -> type:
    """What a flag's value is."""
    if action.nargs == 0 or isinstance(action.const, bool):
        return bool
    return action.type if action.type in (int, float) else str


def check_unchanged(opt: Namespace, config: Path, source: WeightsSource) -> None:
    """The files that a picture is drawn again with are those that it was drawn with.

    ValueError for one that has changed; a warning, where the command line names it. A device that is not here is replaced, with a warning.
    """
    if opt.recorded is None:
        return
    from ldm.inference import choose_device

    info, typed = opt.recorded.info, opt.recorded.typed
    paths = {"config": config, "ckpt": source.path}
    paths |= {name: Path(value) for name in ("init_img", "depth") if (value := getattr(opt, name, None))}
    for name, path in paths.items():
        flag, before = f"--{name.replace('_', '-')}", info.get(f"{name}_fingerprint")
        if before is None or not path.exists():
            continue
        now = source.fingerprint if name == "ckpt" else fingerprint(path)
        if now == before:
            continue
        told = f"{flag} {path}: not the file that {opt.recorded.path} was drawn with (fingerprint {now}, then {before})"
        if name not in typed:
            raise ValueError(f"{told}; give {flag} with that file, or with this one to draw with it all the same")
        logger.warning("%s: the picture will be another", told)
    if "device" not in typed:
        try:
            choose_device(opt.device)
        except ValueError:
            noise = "" if opt.seed_mode == "image" else ", whose noise is another"
            logger.warning(
                "%s was drawn on %s, which is not here; drawing on what is%s", opt.recorded.path, opt.device, noise
            )
            opt.device = "auto"
