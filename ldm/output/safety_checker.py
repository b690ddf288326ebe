"""Stable Diffusion's safety checker: its files, and the model, all of whose weights must be in them.

It compares the CLIP embedding of an image with 17 concepts that its authors chose; 3 more make it stricter (Rando et
al., arXiv 2210.04610). A missing concept would silently flag nothing, so this loader has no default for any weight.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor

from ldm.checkpoint import read_weights, weights_on_meta
from ldm.config.files import load_json
from ldm.paths import find_file

logger = logging.getLogger(__name__)

FOLDER = "models/safety_checker"
REPOSITORY = "CompVis/stable-diffusion-safety-checker"
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class CheckerFiles(NamedTuple):
    """The files of a checker. Without a preprocessor's config, CLIP's is used at the model's size, as published."""

    config: Path
    weights: Path
    preprocessor: Path | None


def find_checker(folder: str | None, flag: str = "--safety on") -> CheckerFiles:
    """The files in a folder; by default in models/safety_checker, else in the hub's cache, else from the hub.

    flag: what requires them, for the message. Raises FileNotFoundError with the next step.
    """
    place = find_file(FOLDER if folder is None else folder)
    if folder is None and not place.is_dir():
        return _from_hub(flag)
    weights = next((place / name for name in WEIGHTS if (place / name).is_file()), None)
    missing = CONFIG if not (place / CONFIG).is_file() else None
    if weights is None or missing:
        what = f"no {missing or ' or '.join(WEIGHTS)} in this folder" if place.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{flag}: --safety_checker {place}: {what}; put config.json and model.safetensors of "
            f"https://huggingface.co/{REPOSITORY} there (--safety off skips the check)"
        )
    return CheckerFiles(place / CONFIG, weights, place / PREPROCESSOR if (place / PREPROCESSOR).is_file() else None)


def _from_hub(flag: str) -> CheckerFiles:
    failure: Exception | None = None
    for cached in (True, False):  # the hub's client has many errors; all mean that the files are unavailable
        try:
            return CheckerFiles(*(_fetch(names, cached) for names in ((CONFIG,), WEIGHTS, (PREPROCESSOR,))))
        except Exception as error:
            failure = error
            if cached:
                logger.info("downloading the safety checker, 1.2 GB (not in the cache: %s)", type(error).__name__)
    raise FileNotFoundError(
        f"{flag}: the safety checker is not in {FOLDER} or the hub's cache, and the download failed "
        f"({type(failure).__name__}); put config.json and model.safetensors of https://huggingface.co/{REPOSITORY} "
        f"into {FOLDER}, or pass their folder with --safety_checker (--safety off skips the check)"
    ) from failure


def _fetch(names: Sequence[str], cached: bool) -> Path:
    """The first of the files that the hub or its cache has."""
    for name in names[:-1]:
        try:
            return Path(hf_hub_download(REPOSITORY, name, local_files_only=cached))
        except Exception as error:
            logger.debug("%s of %s: %s", name, REPOSITORY, error)
    return Path(hf_hub_download(REPOSITORY, names[-1], local_files_only=cached))


class SafetyChecker:
    """diffusers' StableDiffusionSafetyChecker on the CPU in float32, as published; tried on one image when constructed.

    Raises ImportError, ValueError or OSError if it cannot be loaded.
    """

    def __init__(self, files: CheckerFiles) -> None:
        start = time.perf_counter()
        # Its own warning speaks of a black image, which only one of our modes returns.
        logging.getLogger("diffusers.pipelines.stable_diffusion.safety_checker").setLevel(logging.ERROR)
        config = CLIPConfig.from_dict(load_json(files.config))
        with weights_on_meta():
            self.model = StableDiffusionSafetyChecker(config)
        load_all_weights(self.model, files.weights)
        self.model.requires_grad_(False).eval()
        self.model.visual_projection.register_forward_hook(_require_finite)
        side: int = config.vision_config.image_size  # type: ignore[union-attr, assignment] # the stub allows a dict
        if files.preprocessor is not None:
            self.processor = CLIPImageProcessor.from_dict(load_json(files.preprocessor))
        else:
            self.processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        self.flags(Image.new("RGB", (side, side)))
        logger.info("safety checker ready in %.1f s: %s", time.perf_counter() - start, files.weights)

    def flags(self, image: Image.Image) -> bool:
        """True if the checker flags the image; it sees the center square."""
        pixels = self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        # It blackens flagged images in place: it gets a dummy instead of ours.
        _, (flagged,) = self.model(clip_input=pixels.float(), images=torch.zeros(1, 1))
        return bool(flagged)


def load_all_weights(model: nn.Module, weights: Path) -> None:
    """Load every parameter; raise ValueError if one is missing or has another shape, or if a concept is not finite."""
    found = {_plain(name): tensor for name, tensor in read_weights(weights).items()}
    state: dict[str, Tensor] = {}
    for name, wanted in model.state_dict().items():
        tensor = found.get(_plain(name))
        if tensor is None or tensor.shape != wanted.shape:
            has = "is missing in the file" if tensor is None else f"has shape {tuple(tensor.shape)} in the file"
            raise ValueError(f"{weights.name}: {name} {has}, expected {tuple(wanted.shape)}")
        if name.startswith(("concept_", "special_care_")) and not torch.isfinite(tensor).all():
            raise ValueError(f"{weights.name}: {name} has non-finite values, which would flag nothing")
        state[name] = tensor.float()
    model.load_state_dict(state, assign=True)


def _plain(name: str) -> str:
    """Published files have vision_model twice in a name, as transformers up to 5.5."""
    return name.replace("vision_model.vision_model.", "vision_model.", 1)


def _require_finite(module: nn.Module, args: Any, output: Tensor) -> None:
    """NaN compares false with every threshold, so it would flag nothing."""
    if not output.isfinite().all():
        raise ValueError("the CLIP embedding of the image is not finite; are these the checker's weights?")
