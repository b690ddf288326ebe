"""OpenCV, which degradations filter and compress with, imported when the first picture needs it."""

from __future__ import annotations

from types import ModuleType


def load_cv2() -> ModuleType:
    """The module cv2; an ImportError that names the package where it is missing or does not load."""
    try:
        import cv2
    except ImportError as error:
        # The headless build needs no libraries of a desktop; the other one comes with invisible-watermark.
        raise ImportError(f"degradations need OpenCV ({error}): pip install opencv-python-headless") from error
    return cv2
