"""The safety check of drawn pictures, before they become files: on (a black picture in their place), report (kept, and said so), off."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from PIL import Image

from ldm.config.model_info import SAFETY_MODES
from ldm.output.images import GeneratedImage

if TYPE_CHECKING:
    from ldm.config.model_info import ModelInfo
    from ldm.output.safety_checker import SafetyChecker

logger = logging.getLogger(__name__)

PACKAGES = ("diffusers", "transformers")  # the first of the extra `safety`


@dataclass(frozen=True)
class SafetySettings:
    """What is done with pictures that the safety checker flags, and where its weights are."""

    mode: str | None = None  # one of SAFETY_MODES; None: as the model's config says
    checker: str | None = (
        None  # folder with the checker; None: models/safety_checker where that is there, else the hub's
    )

    def checked(self, info: ModelInfo) -> SafetySettings:
        """The same settings with the config's own mode filled in; ValueError names a flag, its value and the choices."""
        mode = info.safety if self.mode is None else self.mode
        if mode not in SAFETY_MODES:
            raise ValueError(f"--safety {mode}: choose one of {', '.join(SAFETY_MODES)}")
        if self.checker is not None and mode == "off":
            why = "" if self.mode else ", which is what this config says"
            raise ValueError(
                f"--safety_checker {self.checker} with --safety off{why}: nothing is checked; give --safety on or report too"
            )
        return replace(self, mode=mode)


class Safety:
    """The check that every drawn picture passes on its way to a file; its outcome goes into the picture's metadata.

    `safety` is the mode, `flagged` true or false, or None where nothing was checked. Made with settings that are `checked`; call `ready`
    before the model is loaded, so that a checker which cannot run is known before anything is drawn.
    """

    def __init__(self, settings: SafetySettings) -> None:
        self.settings, self._checker = settings, None

    def ready(self) -> Safety:
        """Load the checker, unless the mode is off. Raises ImportError, ValueError or OSError, in one line with the next step."""
        if self.settings.mode != "off" and self._checker is None:
            self._checker = self._loaded()
        return self

    def __call__(self, picture: GeneratedImage) -> GeneratedImage:
        """The picture as it may be written. ValueError where the checker fails on it: then it must not be written at all."""
        mode = self.settings.mode
        flagged = None if mode == "off" else self._flags(picture)
        picture = picture._replace(info={**picture.info, "safety": mode, "flagged": flagged}, checked=True)
        if not flagged:
            return picture
        which = f"picture {picture.info['image_index']}" if "image_index" in picture.info else "the picture"
        if mode == "report":
            logger.warning("the safety checker flags %s; it is kept, with flagged: true in its metadata", which)
            return picture
        logger.warning("the safety checker flags %s; a black one is written in its place", which)
        return picture._replace(
            image=Image.new("RGB", picture.image.size), drawn=Image.new("1", picture.image.size)
        )  # nothing is drawn

    def _flags(self, picture: GeneratedImage) -> bool:
        checker = self.ready()._checker
        try:
            return checker.flags(picture.image)
        except Exception as error:
            raise ValueError(
                f"the safety checker failed, so that this picture and those after it are not saved: {error}"
            ) from error

    def _loaded(self) -> SafetyChecker:
        flag = f"--safety {self.settings.mode}"
        missing = [name for name in PACKAGES if find_spec(name) is None]
        if missing:
            raise ImportError(
                f'{flag}: the safety checker needs {" and ".join(missing)}: pip install -e ".[safety]" brings them; '
                "nothing was drawn (--safety off draws without a check)"
            )
        from ldm.output.safety_checker import SafetyChecker, find_checker

        files = find_checker(self.settings.checker, flag)
        try:
            return SafetyChecker(files)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{flag}: the safety checker in {files.config.parent} cannot run: {reason}; nothing was drawn "
                "(--safety_checker FOLDER names another, --safety off draws without a check)"
            ) from error
