"""The model files that a page offers, named by whoever started it, and the one that is loaded."""

from __future__ import annotations

import copy
import logging
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ldm import inference
from ldm.cli import counted, one_line
from ldm.config.model_info import ModelInfo
from ldm.inference import cli
from ldm.inference.settings import embedding_text, lora_text, parse_embedding, parse_lora
from ldm.paths import SD_CKPT, find_file, in_checkout

if TYPE_CHECKING:  # imports torch
    from ldm.models.diffusion.controlnet import ControlNet
    from ldm.web.preview import Previews

logger = logging.getLogger(__name__)

QUICKSTART = "outputs/quickstart/runs"
KINDS = ("lora", "embedding", "controlnet")  # of files that are added to a model, and their folders in --models
_WEIGHTS = (".ckpt", ".safetensors", ".pth", ".pt", ".bin")
_NO_MODELS = (*KINDS, "safety_checker")

T = TypeVar("T")


class Choice(NamedTuple):
    """Model and adapters of a job, by the names that the page offers."""

    model: str
    lora: tuple[tuple[str, float], ...] = ()  # (name, strength)
    embedding: tuple[str, ...] = ()
    controlnet: tuple[str, ...] = ()


class Loaded(NamedTuple):
    """A model that is ready for sampling."""

    choice: Choice
    prepared: cli.Prepared
    pipeline: inference.Pipeline
    controlnets: list[ControlNet]
    previews: Previews | None  # None where the safety checker replaces images: it does not see previews


class Shelf:
    """Models, LoRA files, embeddings and ControlNets by name: no other file can be chosen in the browser.

    opt: the flags of the server; those of a sampling script apply to every model. Raises ValueError or OSError for
    files that are missing.
    """

    def __init__(self, opt: Namespace) -> None:
        self.opt = opt
        self.loaded: Loaded | None = None
        folder = None if opt.models is None else find_file(opt.models)
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"--models {opt.models}: no such folder")
        files: dict[str, list[str]] = {}
        for kind in KINDS:
            beside = [] if folder is None else sorted(map(str, _weights_in(folder / kind)))
            files[kind] = [*getattr(opt, kind), *beside]
        self.lora = _named((parse_lora(text)[0] for text in files["lora"]), Path)
        self.embedding = _named((parse_embedding(text) for text in files["embedding"]), lambda file: file[0])
        self.controlnet = _named(map(cli.find_controlnet, files["controlnet"]), Path)
        found = [] if folder is None else list(_models_in(folder))
        self.models = _named([*map(find_file, opt.ckpt), *found] or default_models(), Path)
        self.info = cache(self._info)
        self._drop_others(found)

    def _drop_others(self, found: Sequence[Path]) -> None:
        """Leave out what is no diffusion model of those that were found in a folder, such as first stages."""
        for name, path in list(self.models.items()):
            try:
                self.info(name)
            except (ValueError, OSError) as error:
                if path not in found:
                    raise
                logger.info("%s is not offered: %s", path, one_line(error))
                del self.models[name]
        if not self.models:
            raise FileNotFoundError(f"--models {self.opt.models}: no diffusion model in it; pass --ckpt PATH, too")

    def options(self, choice: Choice) -> Namespace:
        """The flags of a script that samples with this choice. Raises ValueError for a name that is not offered."""
        opt, model = copy.copy(self.opt), _offered("model", self.models, choice.model)
        opt.ckpt = str(model)
        opt.lora = [lora_text(_offered("LoRA", self.lora, name), strength) for name, strength in choice.lora]
        for text in opt.lora:
            parse_lora(text)  # checks the strength
        opt.embedding = [embedding_text(*_offered("embedding", self.embedding, name)) for name in choice.embedding]
        opt.controlnet = [str(_offered("ControlNet", self.controlnet, name)) for name in choice.controlnet]
        if opt.config is None:
            beside = model.with_suffix(".yaml")
            opt.config = str(beside) if beside.is_file() else cli.SD_CONFIG
        return opt

    def _info(self, model: str) -> tuple[ModelInfo, list[str]]:
        """The facts of a model, and the names of its classes."""
        opt = self.options(Choice(model))
        run = inference.run_of(opt.ckpt)
        info = cli.read_info(opt)
        return info, run.class_names if run is not None and info.n_classes is not None else []

    def load(self, choice: Choice) -> Loaded:
        """The model of a choice, loaded unless it is the one before, which is dropped first: memory holds one model.

        One thread at a time may call it. Raises ValueError or OSError.
        """
        if self.loaded is not None and self.loaded.choice == choice:
            return self.loaded
        self.loaded = None
        opt = self.options(choice)
        info = cli.read_info(opt)
        prepared = cli.prepare(opt, info)
        opt.control_image = None  # a ControlLDM is used by the task that it is for
        pipeline = cli.load(opt, prepared, **({"controlnet": opt.controlnet} if opt.controlnet else {}))
        nets = [inference.load_controlnet(pipeline, path, opt.use_ema) for path in opt.controlnet]
        if nets:
            pipeline.identity = {**pipeline.identity, "use_ema": opt.use_ema}  # as in control2img.py
        from ldm.web.preview import Previews  # torch

        hidden = prepared.safety.settings.mode == "on"
        self.loaded = Loaded(choice, prepared, pipeline, nets, None if hidden else Previews(pipeline))
        return self.loaded

    def choice_of(self, recorded: Mapping[str, Any]) -> tuple[Choice, list[str]]:
        """The choice that an image was generated with, and a note for each of its files that is not offered.

        Metadata come from anyone: their paths are compared with those of the offered files, and never opened.
        """
        notes: list[str] = []

        def find(kind: str, texts: Any, offered: Mapping[str, str]) -> list[tuple[str, str]]:
            """(name, what follows the path) of each file."""
            found = []
            for text in map(str, texts if isinstance(texts, list) else [texts] if texts else []):
                path = next((path for path in offered if text == path or text.startswith(f"{path}:")), None)
                if path is None:
                    notes.append(f"the {kind} {text} of this image is not offered here")
                else:
                    found.append((offered[path], text.removeprefix(path).lstrip(":")))
            return found

        model = find("model", recorded.get("ckpt"), _by_path({n: _weights_of(x) for n, x in self.models.items()}))
        lora = find("LoRA", recorded.get("lora"), _by_path(self.lora))
        tokens = find("embedding", recorded.get("embedding"), _by_path({n: x for n, (x, _) in self.embedding.items()}))
        nets = find("ControlNet", recorded.get("controlnet"), _by_path(self.controlnet))
        choice = Choice(
            model[0][0] if model else next(iter(self.models)),
            tuple((name, _strength(rest)) for name, rest in lora),
            tuple(name for name, _ in tokens),
            tuple(name for name, _ in nets),
        )
        return choice, notes


def default_models() -> list[Path]:
    """Stable Diffusion at its published place, and the newest quickstart run. Raises FileNotFoundError without them."""
    runs = sorted(find_file(QUICKSTART).glob("*_text2image/checkpoints/last.ckpt"))
    found = [path for path in [find_file(SD_CKPT)] if path.is_file()] + [run.parent.parent for run in runs[-1:]]
    if not found:
        raise FileNotFoundError(
            "no model: train one with python scripts/quickstart.py (6 minutes on two CPU cores), or pass --ckpt PATH "
            f"or --models FOLDER (neither {SD_CKPT} nor a run in {QUICKSTART} exists)"
        )
    return found


_GENERIC = ("model.ckpt", "last.ckpt", "model.safetensors", "lora.safetensors", "checkpoints")  # names that say nothing


def _named(files: Iterable[T], path_of: Callable[[T], Path]) -> dict[str, T]:
    """Files by their names, with that of the folder where several are alike, or the whole path."""
    every = list({path_of(file).resolve(): file for file in files}.values())
    for parts in (1, 2):
        names = ["/".join(path_of(file).parts[-parts:]) for file in every]
        if len(set(names)) == len(names) and not set(names) & set(_GENERIC):
            return dict(zip(names, every))
    return {str(path_of(file)): file for file in every}


def _offered(kind: str, files: Mapping[str, T], name: str) -> T:
    if name not in files:
        raise ValueError(f"{kind} {name!r}: not offered here; choose one of {', '.join(files) or 'none'}")
    return files[name]


def _by_path(files: Mapping[str, Path]) -> dict[str, str]:
    """Names by the path as metadata have it."""
    return {in_checkout(path): name for name, path in files.items()}


def _weights_of(path: Path) -> Path:
    run = inference.run_of(path)
    return path if run is None else run.ckpt


def _strength(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 1.0


def parse_strengths(text: str | None, count: int) -> list[float]:
    """Strengths of `count` LoRAs as typed in the form: one for all, or one for each. Raises ValueError."""
    words = (text or "").split() or ["1"]
    try:
        strengths = [float(word) for word in words] * (count if len(words) == 1 else 1)
    except ValueError:
        raise ValueError(f"LoRA strength {text}: expected numbers, e.g. 0.8, or 0.8 0.4 for two LoRAs") from None
    if count and len(strengths) != count:
        raise ValueError(
            f"LoRA strength {text}: {len(words)} numbers for {counted(count, 'LoRA')}; pass one, or one for each"
        )
    return strengths


def _weights_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("*") if path.suffix in _WEIGHTS)


def _models_in(folder: Path) -> Iterator[Path]:
    """Runs, folders of released models and of diffusers, and weights, at any depth."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in _NO_MODELS:
            if _is_model(path):
                yield path
            else:
                yield from _models_in(path)
        elif path.suffix in _WEIGHTS[:2]:
            yield path


def _is_model(folder: Path) -> bool:
    if (folder / "unet" / "config.json").is_file():
        return True
    try:
        return inference.run_of(folder) is not None
    except FileNotFoundError:  # the config of a released model whose weights were not downloaded
        return False
