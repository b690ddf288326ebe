"""Safety check of generated images before they are saved: on (black instead), report (saved and flagged), off."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from PIL import Image

from ldm.config.model_info import SAFETY_MODES, ModelInfo
from ldm.output.images import GeneratedImage

if TYPE_CHECKING:  # imports torch, diffusers and transformers
    from ldm.output.safety_checker import SafetyChecker

logger = logging.getLogger(__name__)

PACKAGES = ("diffusers", "transformers")


@dataclass(frozen=True)
class SafetySettings:
    """The treatment of images that the safety checker flags, and the path of its weights."""

    mode: str | None = None  # one of SAFETY_MODES; None: the config's default
    checker: str | None = None  # folder of the checker; None: models/safety_checker if present, else the hub

    def checked(self, info: ModelInfo) -> SafetySettings:
        """Return the settings with the model's default; raise ValueError with the flag, its value and the choices."""
        mode = info.safety if self.mode is None else self.mode
        if mode not in SAFETY_MODES:
            raise ValueError(f"--safety {mode}: choose one of {', '.join(SAFETY_MODES)}")
        if self.checker is not None and mode == "off":
            why = "" if self.mode else " (the default of this config)"
            raise ValueError(f"--safety_checker {self.checker} with --safety off{why}: add --safety on or report")
        return replace(self, mode=mode)


class Safety:
    """The check of every generated image; metadata `safety` is the mode, `flagged` the result (None if unchecked).

    The settings must be `checked`. Call `ready` before loading the model, so that a missing checker is reported first.
    """

    def __init__(self, settings: SafetySettings) -> None:
        self.settings = settings
        self._checker: SafetyChecker | None = None

    def ready(self) -> Safety:
        """Load the checker unless the mode is off; raise ImportError, ValueError or OSError with the next step."""
        if self.settings.mode != "off" and self._checker is None:
            self._checker = self._load()
        return self

    def __call__(self, image: GeneratedImage) -> GeneratedImage:
        """The image as it may be saved; raise ValueError if the checker fails: then it must not be saved."""
        mode = self.settings.mode
        flagged = None if mode == "off" else self._flags(image.image)
        image = image._replace(info={**image.info, "safety": mode, "flagged": flagged}, checked=True)
        if not flagged:
            return image
        name = f"image {image.info['image_index']}" if "image_index" in image.info else "the image"
        if mode == "report":
            logger.warning("the safety checker flagged %s; it is saved with flagged: true in its metadata", name)
            return image
        logger.warning("the safety checker flagged %s; a black image is saved instead", name)
        black, nothing = Image.new("RGB", image.image.size), Image.new("1", image.image.size)
        return image._replace(image=black, generated=nothing)

    def _flags(self, image: Image.Image) -> bool:
        checker = self.ready()._checker
        assert checker is not None
        try:
            return checker.flags(image)
        except Exception as error:
            raise ValueError(
                f"the safety checker failed, so this and all further images are not saved: {error}"
            ) from error

    def _load(self) -> SafetyChecker:
        flag = f"--safety {self.settings.mode}"
        missing = [name for name in PACKAGES if find_spec(name) is None]
        if missing:
            raise ImportError(
                f'{flag}: the safety checker requires {" and ".join(missing)}: pip install -e ".[safety]" '
                "(--safety off skips the check)"
            )
        from ldm.output.safety_checker import SafetyChecker, find_checker  # optional packages, and torch

        files = find_checker(self.settings.checker, flag)
        try:
            return SafetyChecker(files)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{flag}: the safety checker in {files.config.parent} cannot be loaded: {reason} "
                "(--safety_checker FOLDER chooses another, --safety off skips the check)"
            ) from error
