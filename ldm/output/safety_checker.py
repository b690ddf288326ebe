"""Stable Diffusion's safety checker: where its files are, and the model, whose weights must all be there.

It compares CLIP's view of a picture with 17 concepts that its authors chose, 3 more make it stricter (Rando et al., arXiv 2210.04610).
A concept that a file lacks would flag nothing, without a word: hence a loader of our own, which knows no default for any weight.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ldm.config.files import load_json
from ldm.paths import find_file

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

FOLDER = "models/safety_checker"
REPOSITORY = "CompVis/stable-diffusion-safety-checker"
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class CheckerFiles(NamedTuple):
    """The files of a checker; without a preprocessor's config the published one holds (CLIP's own), in the model's size."""

    config: Path
    weights: Path
    preprocessor: Path | None


def find_checker(folder: str | None, flag: str = "--safety on") -> CheckerFiles:
    """The files in a folder; without one in models/safety_checker, else in the hub's cache, else from the hub.

    flag: what asks for them, for the message. Raises FileNotFoundError in one line with the next step.
    """
    place = find_file(FOLDER if folder is None else folder)
    if folder is None and not place.is_dir():
        return _from_hub(flag)
    weights = next((place / name for name in WEIGHTS if (place / name).is_file()), None)
    lacking = CONFIG if not (place / CONFIG).is_file() else " or ".join(WEIGHTS) if weights is None else None
    if lacking:
        what = "no such folder" if not place.is_dir() else f"holds no {lacking}"
        raise FileNotFoundError(
            f"{flag}: --safety_checker {place}: {what}; put config.json and model.safetensors of "
            f"https://huggingface.co/{REPOSITORY} there; nothing was drawn (--safety off draws without a check)"
        )
    return CheckerFiles(place / CONFIG, weights, place / PREPROCESSOR if (place / PREPROCESSOR).is_file() else None)


def _from_hub(flag: str) -> CheckerFiles:
    from huggingface_hub import hf_hub_download

    def fetch(*names: str, cached: bool) -> Path:
        for name in names[:-1]:
            try:
                return Path(hf_hub_download(REPOSITORY, name, local_files_only=cached))
            except Exception as error:  # the next name may be there
                logger.debug("%s of %s: %s", name, REPOSITORY, error)
        return Path(hf_hub_download(REPOSITORY, names[-1], local_files_only=cached))

    def fetch_all(cached: bool) -> CheckerFiles:
        return CheckerFiles(
            fetch(CONFIG, cached=cached), fetch(*WEIGHTS, cached=cached), fetch(PREPROCESSOR, cached=cached)
        )

    try:
        return fetch_all(cached=True)
    except (
        Exception
    ) as error:  # the hub's client fails in many ways, and all of them mean that the files are not to be had
        logger.info(
            "the safety checker is not in the hub's cache (%s): asking the hub for it, 1.2 GB", type(error).__name__
        )
    try:
        return fetch_all(cached=False)
    except Exception as error:
        raise FileNotFoundError(
            f"{flag}: the safety checker is neither in {FOLDER} nor in the hub's cache nor to be downloaded ({type(error).__name__}); "
            f"put config.json and model.safetensors of https://huggingface.co/{REPOSITORY} into {FOLDER}, or name a folder that has them "
            "with --safety_checker; nothing was drawn (--safety off draws without a check)"
        ) from error


class SafetyChecker:
    """diffusers' StableDiffusionSafetyChecker on the CPU in float32, as published; it has looked at one picture when it is made.

    Raises ImportError, ValueError or OSError where it cannot be made.
    """

    def __init__(self, files: CheckerFiles) -> None:
        start = time.perf_counter()
        from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
        from PIL import Image
        from transformers import CLIPConfig, CLIPImageProcessor

        from ldm.checkpoint import weights_on_meta

        # Its own words on a flagged picture tell of a black one in its place, which is not so in every mode.
        logging.getLogger("diffusers.pipelines.stable_diffusion.safety_checker").setLevel(logging.ERROR)
        config = CLIPConfig.from_dict(load_json(files.config))
        with weights_on_meta():
            self.model = StableDiffusionSafetyChecker(config)
        load_all_weights(self.model, files.weights)
        self.model.requires_grad_(False).eval()
        self.model.visual_projection.register_forward_hook(_must_be_finite)
        side = config.vision_config.image_size
        if files.preprocessor is not None:
            self.processor = CLIPImageProcessor.from_dict(load_json(files.preprocessor))
        else:
            self.processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        self.flags(Image.new("RGB", (side, side)))
        logger.info("safety checker ready in %.1f s: %s", time.perf_counter() - start, files.weights)

    def flags(self, image: Image.Image) -> bool:
        """Whether the picture shows what must not be shown, as far as the checker can tell. It sees the square in the middle."""
        import torch

        pixels = self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        _, (flagged,) = self.model(
            clip_input=pixels.float(), images=torch.zeros(1, 1)
        )  # it blackens what it flags; ours is not given
        return bool(flagged)


def load_all_weights(model: nn.Module, weights: Path) -> None:
    """Give every parameter its tensor of the file; ValueError where one is missing or of another shape, or a concept is not finite."""
    import torch

    from ldm.checkpoint import read_weights

    found = {_plain(name): tensor for name, tensor in read_weights(weights).items()}
    state: dict[str, Tensor] = {}
    for name, wanted in model.state_dict().items():
        tensor = found.get(_plain(name))
        if tensor is None or tensor.shape != wanted.shape:
            has = "lacks it" if tensor is None else f"has {tuple(tensor.shape)}"
            raise ValueError(f"{weights.name}: the checker needs {name} {tuple(wanted.shape)}, and the file {has}")
        if name.startswith(("concept_", "special_care_")) and not torch.isfinite(tensor).all():
            raise ValueError(
                f"{weights.name}: {name} holds numbers that are not finite, with which nothing is ever flagged"
            )
        state[name] = tensor.float()
    model.load_state_dict(state, assign=True)


def _plain(name: str) -> str:
    """Published files say vision_model twice; transformers does so up to 5.5."""
    return name.replace("vision_model.vision_model.", "vision_model.", 1)


def _must_be_finite(module: nn.Module, args: tuple, output: Tensor) -> None:
    """A comparison with NaN flags nothing: an error instead."""
    if not output.isfinite().all():
        raise ValueError("CLIP's view of the picture is not finite; are these the checker's weights?")
