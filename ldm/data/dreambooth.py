"""Datasets of DreamBooth (Ruiz et al. 2022, arXiv 2208.12242): few images of a subject, and images of its class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm.config.types import NonNegativeFloat, PathText, PositiveFloat, PositiveInt
from ldm.data.base import CombinedDataset, DataConfigError
from ldm.data.folder import ImageFolder
from ldm.data.image import Size


class ClassImages(ImageFolder):
    """Images of a subject's class, e.g. "a photo of a dog", on which prior preservation trains (section 3.2).

    Before it trains, main.py generates those that the folder lacks with the weights that the training starts from.
    prompt: their caption. count: images wanted. scale, steps, batch_size: guidance scale, sampling steps and images per
    batch of the generation; size: that of the generated images too. Other parameters as in ImageFolder.
    """

    content = "class images"

    def __init__(
        self,
        root: PathText,
        prompt: str,
        count: PositiveInt = 200,
        scale: PositiveFloat = 7.5,
        steps: PositiveInt = 50,
        batch_size: PositiveInt = 4,
        size: Size = 256,
        **options: Any,
    ) -> None:
        super().__init__(root, size, subject=prompt, **options)
        if len(self) < count:
            problem = f"{self.root} holds {len(self)} usable images"
            raise DataConfigError("count", count, problem, "set {param} to a smaller number, or let main.py generate")


class DreamBooth(CombinedDataset):
    """Images of a subject in turn with images of its class, whose errors count `prior_weight` times in the loss.

    instance: dataset of the subject, e.g. an ImageFolder with `subject: a photo of sks dog`. prior: dataset of its
    class, usually ClassImages; None trains without prior preservation. The smaller one repeats.

    An item holds the keys that items of both have, and `loss_weight` float32 (eq. 2: 1, or lambda for the class).
    """

    def __init__(
        self,
        instance: Mapping[str, Any],
        prior: Mapping[str, Any] | None = None,
        prior_weight: NonNegativeFloat = 1.0,
    ) -> None:
        super().__init__({"instance": instance} if prior is None else {"instance": instance, "prior": prior})
        self.weights = {"instance": 1.0, "prior": prior_weight}

    def __len__(self) -> int:
        return len(self.parts) * max(map(len, self.parts.values()))

    def __getitem__(self, index: int) -> dict[str, Any]:
        weight = self.weights[self._place(index)[0]]
        return {**super().__getitem__(index), "loss_weight": np.float32(weight)}

    def _place(self, index: int) -> tuple[str, int]:
        place, turn = divmod(index, len(self.parts))
        name = list(self.parts)[turn]
        return name, place % len(self.parts[name])
