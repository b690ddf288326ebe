"""Blur kernels of the degradations: Gaussians, round and elliptic, also centered between pixels."""

from __future__ import annotations

import numpy as np

from ldm.modules.image_degradation.opencv import load_cv2


def gaussian_kernel(size: int, widths: tuple[float, float], angle: float = 0.0, shift: float = 0.0) -> np.ndarray:
    """An odd kernel that sums to 1 -> (size, size) float32.

    widths: standard deviations along its two axes in pixels, the same for a round one. angle: of the first axis against the x axis, in
    radians. shift: how far its center lies right of and below the middle pixel, in pixels.
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size {size}: a kernel has an odd number of pixels")
    place = np.arange(size) - size // 2 - shift
    x, y = np.meshgrid(place, place)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    first, second = (max(width, 1e-3) for width in widths)  # of width 0 it is one pixel
    exponent = -0.5 * ((along / first) ** 2 + (across / second) ** 2)
    kernel = np.exp(exponent - exponent.max())
    return (kernel / kernel.sum()).astype(np.float32)


def blur(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """`image` (H, W, 3) weighted by the kernel around each pixel, reflected at the borders -> (H, W, 3)."""
    cv2 = load_cv2()
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)
