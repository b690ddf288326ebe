"""The degradation model of BSRGAN: blur, downsampling and noise in a random order (Zhang et al. 2021, arXiv 2103.14006, section 3).

A picture loses resolution by blur twice (round or elliptic Gaussians), downsampling in two parts, noise (of one color, of three, or with
correlated colors) and JPEG, in an order drawn for each picture, and by JPEG once more at the end. Camera noise, the paper's seventh step,
needs a model of a camera and is left out, as in the published latent diffusion code. All random numbers come from the global generators of
Python and NumPy, which the data module seeds for each sample.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from ldm.modules.image_degradation.kernels import blur, gaussian_kernel
from ldm.modules.image_degradation.opencv import load_cv2

LEVELS = 255.0


@dataclass(frozen=True)
class Degradation:
    """How strong each step is; widths in pixels, noise in levels of 255, qualities JPEG's."""

    blurs: int = 2
    blur_scale: float = 1.0  # of the largest variance of elliptic blurs, 4 + f, and deviation of round ones, 2 + f / 5 (downsampling by f)
    kernel_sizes: tuple[int, int] = (7, 21)  # of elliptic blurs, odd
    round_kernel_sizes: tuple[int, int] = (7, 21)
    halved_first: float = 0.25  # probability that a downsampling by 4 begins with one by 2
    resized: float = (
        0.75  # probability that the first downsampling is a resize to anything from full size to half the final one
    )
    noise: tuple[int, int] = (2, 25)
    jpeg: float = 0.9  # probability of JPEG before the last
    jpeg_quality: tuple[int, int] = (30, 95)

    def __call__(self, image: np.ndarray, factor: int) -> np.ndarray:
        """`image` uint8 (H, W, 3) -> uint8 (H // factor, W // factor, 3). ValueError for what is no such picture, or too small."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"picture of shape {image.shape} and type {image.dtype}: expected (H, W, 3) of uint8")
        if not 1 <= factor <= min(image.shape[:2]):
            raise ValueError(
                f"downscaling by {factor}: a picture of {image.shape[0]}x{image.shape[1]} allows 1 .. {min(image.shape[:2])}"
            )
        height, width = (side // factor for side in image.shape[:2])
        x = image[: height * factor, : width * factor].astype(np.float32) / LEVELS
        left = factor  # how much of the downsampling is still to come
        if factor == 4 and random.random() < self.halved_first:
            x, left = resize(x, 2 * height, 2 * width), 2
        for step in self._order():
            if step == "blur":
                x = self._blurred(x, left)
            elif step == "shrink":
                x = self._shrunk(x, left)
            elif step == "final size":
                x = resize(x, height, width)
            elif step == "noise":
                x = add_noise(x, random.randint(*self.noise) / LEVELS, self.noise[1] / LEVELS)
            elif random.random() < self.jpeg:
                x = compress(x, random.randint(*self.jpeg_quality))
        return to_levels(compress(x, random.randint(*self.jpeg_quality)))

    def _order(self) -> list[str]:
        """The steps of one picture; of the two parts of the downsampling the final size comes last."""
        steps = ["blur"] * self.blurs + ["shrink", "final size", "noise", "jpeg"]
        random.shuffle(steps)
        first, last = sorted((steps.index("shrink"), steps.index("final size")))
        steps[first], steps[last] = "shrink", "final size"
        return steps

    def _blurred(self, x: np.ndarray, left: int) -> np.ndarray:
        if random.random() < 0.5:
            variance = self.blur_scale * (4 + left)
            widths = (np.sqrt(variance * random.random()), np.sqrt(variance * random.random()))
            return blur(x, gaussian_kernel(_odd(self.kernel_sizes), widths, random.uniform(0, np.pi)))
        width = self.blur_scale * (2 + 0.2 * left) * random.random()
        return blur(x, gaussian_kernel(_odd(self.round_kernel_sizes), (width, width)))

    def _shrunk(self, x: np.ndarray, left: int) -> np.ndarray:
        """The first part of the downsampling: a resize, or a blur around the middle of the pixels that each kept one stands for."""
        if random.random() < self.resized:
            factor = random.uniform(1, 2 * left)
            return resize(x, max(1, int(x.shape[0] / factor)), max(1, int(x.shape[1] / factor)))
        width = random.uniform(0.1, 0.6 * left)
        return blur(x, gaussian_kernel(25, (width, width), shift=(left - 1) / 2))[::left, ::left]


def resize(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """`x` at that size by a filter drawn of bilinear, bicubic and area -> (height, width, 3), in [0, 1]."""
    cv2 = load_cv2()
    how = random.choice((cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA))
    return np.clip(cv2.resize(x, (width, height), interpolation=how), 0.0, 1.0)


def add_noise(x: np.ndarray, level: float, widest: float) -> np.ndarray:
    """`x` with Gaussian noise of standard deviation `level`: grey or of three colors, 40 % each, or else with random covariance of the
    colors up to `widest` squared (section 3.3) -> (H, W, 3) in [0, 1]."""
    kind = random.random()
    if kind < 0.4:
        noise = np.random.normal(0.0, level, (*x.shape[:2], 1))
    elif kind < 0.8:
        noise = np.random.normal(0.0, level, x.shape)
    else:
        axes, _ = np.linalg.qr(np.random.normal(size=(3, 3)))
        scales = widest * np.sqrt(np.random.random(3))
        noise = np.random.normal(size=x.shape) * scales @ axes.T  # covariance: axes diag(scales^2) axes^T
    return np.clip(x + noise, 0.0, 1.0).astype(np.float32)


def compress(x: np.ndarray, quality: int) -> np.ndarray:
    """`x` (H, W, 3) in [0, 1] as JPEG of that quality gives it back."""
    cv2 = load_cv2()
    _, code = cv2.imencode(".jpg", to_levels(x)[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(code, cv2.IMREAD_COLOR)[:, :, ::-1].astype(np.float32) / LEVELS


def to_levels(x: np.ndarray) -> np.ndarray:
    """[0, 1] -> uint8, rounded."""
    return np.clip(np.rint(x * LEVELS), 0, LEVELS).astype(np.uint8)


def _odd(sizes: tuple[int, int]) -> int:
    """An odd number from sizes[0] to sizes[1], each equally likely."""
    return 2 * random.randint(sizes[0] // 2, sizes[1] // 2) + 1
