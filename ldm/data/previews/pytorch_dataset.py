"""The text-to-image LDM's training data by its published names: any folder of pictures with a .txt caption beside each."""

from __future__ import annotations

from typing import Any

from ldm.data.folder import ImageFolder
from ldm.data.image import Size


class PreviewsTrain(ImageFolder):
    """The training part of a captioned folder; for all of it say `split: null`. Other parameters are those of ImageFolder."""

    def __init__(
        self,
        root: str | None = None,
        size: Size = 256,
        captions: str = "sidecar",
        split: str | None = "train",
        **options: Any,
    ) -> None:
        super().__init__(root, size, captions=captions, split=split, **options)


class PreviewsValidation(ImageFolder):
    """The validation part of a captioned folder; for all of it say `split: null`. Other parameters are those of ImageFolder."""

    def __init__(
        self,
        root: str | None = None,
        size: Size = 256,
        captions: str = "sidecar",
        split: str | None = "validation",
        **options: Any,
    ) -> None:
        super().__init__(root, size, captions=captions, split=split, **options)
