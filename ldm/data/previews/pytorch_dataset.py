"""The text-to-image LDM's training data by its published names: any folder of images with .txt captions."""

from ldm.data.folder import Defaults


class PreviewsTrain(Defaults, captions="sidecar", split="train"):
    """Training split of a captioned folder; `split: null` uses all of it. Parameters as in ImageFolder."""


class PreviewsValidation(Defaults, captions="sidecar", split="validation"):
    """Validation split of a captioned folder; `split: null` uses all of it. Parameters as in ImageFolder."""
