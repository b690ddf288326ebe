"""Degradation model of BSRGAN: blur, downsampling and noise in random order (arXiv 2103.14006, section 3).

An image is degraded by two blurs (isotropic or anisotropic Gaussians), downsampling in two parts, noise (gray, color or
with correlated channels) and JPEG, in random order, and by a final JPEG. As in the published latent diffusion code,
camera noise, the paper's seventh step, is left out. All random numbers come from the global generators of Python and
NumPy, which the data module seeds for each sample.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import ModuleType

import numpy as np

LEVELS = 255.0


def load_cv2() -> ModuleType:
    """Import OpenCV on first use: its desktop build does not load on servers without display libraries."""
    try:
        import cv2
    except ImportError as error:
        raise ImportError(f"degradations need OpenCV ({error}): pip install opencv-python-headless") from error
    return cv2


@dataclass(frozen=True)
class Degradation:
    """Strength of each step; sizes in pixels, noise in levels of 255, JPEG qualities.

    For a downsampling by f the largest variance of anisotropic blurs is blur_scale * (4 + f), and the largest standard
    deviation of isotropic ones blur_scale * (2 + f / 5).
    """

    blurs: int = 2
    blur_scale: float = 1.0
    kernel_sizes: tuple[int, int] = (7, 21)  # of anisotropic blurs, odd
    round_kernel_sizes: tuple[int, int] = (7, 21)  # of isotropic blurs, odd
    halved_first: float = 0.25  # probability that a downsampling by 4 begins with one by 2
    resized: float = 0.75  # probability that the first part is a resize, to between full size and half the final size
    noise: tuple[int, int] = (2, 25)
    jpeg: float = 0.9  # probability of JPEG before the last
    jpeg_quality: tuple[int, int] = (30, 95)

    def __call__(self, image: np.ndarray, factor: int) -> np.ndarray:
        """`image` uint8 (H, W, 3) -> uint8 (H // factor, W // factor, 3). ValueError for other or too small images."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"image of shape {image.shape} and dtype {image.dtype}: expected (H, W, 3) of uint8")
        largest = min(image.shape[:2])
        if not 1 <= factor <= largest:
            raise ValueError(
                f"downsampling by {factor}: an image of {image.shape[0]}x{image.shape[1]} supports 1 to {largest}"
            )
        height, width = (side // factor for side in image.shape[:2])
        x = image[: height * factor, : width * factor].astype(np.float32) / LEVELS
        remaining = factor  # of the downsampling
        if factor == 4 and random.random() < self.halved_first:
            x, remaining = resize(x, 2 * height, 2 * width), 2
        for step in self._order():
            if step == "blur":
                x = self._blur(x, remaining)
            elif step == "shrink":
                x = self._shrink(x, remaining)
            elif step == "final size":
                x = resize(x, height, width)
            elif step == "noise":
                x = add_noise(x, random.randint(*self.noise) / LEVELS, self.noise[1] / LEVELS)
            elif random.random() < self.jpeg:
                x = compress(x, random.randint(*self.jpeg_quality))
        return to_levels(compress(x, random.randint(*self.jpeg_quality)))

    def _order(self) -> list[str]:
        """Return the steps of one image in random order, but "shrink" before "final size"."""
        steps = ["blur"] * self.blurs + ["shrink", "final size", "noise", "jpeg"]
        random.shuffle(steps)
        first, last = sorted((steps.index("shrink"), steps.index("final size")))
        steps[first], steps[last] = "shrink", "final size"
        return steps

    def _blur(self, x: np.ndarray, remaining: int) -> np.ndarray:
        if random.random() < 0.5:
            variance = self.blur_scale * (4 + remaining)
            widths = (np.sqrt(variance * random.random()), np.sqrt(variance * random.random()))
            return blur(x, gaussian_kernel(_odd(self.kernel_sizes), widths, random.uniform(0, np.pi)))
        width = self.blur_scale * (2 + 0.2 * remaining) * random.random()
        return blur(x, gaussian_kernel(_odd(self.round_kernel_sizes), (width, width)))

    def _shrink(self, x: np.ndarray, remaining: int) -> np.ndarray:
        """First part of the downsampling: a resize, or a blur and one pixel of each block, centered on the block."""
        if random.random() < self.resized:
            factor = random.uniform(1, 2 * remaining)
            return resize(x, max(1, int(x.shape[0] / factor)), max(1, int(x.shape[1] / factor)))
        width = random.uniform(0.1, 0.6 * remaining)
        kernel = gaussian_kernel(25, (width, width), shift=(remaining - 1) / 2)
        return blur(x, kernel)[::remaining, ::remaining]


def degradation_bsrgan_variant(image: np.ndarray, sf: int = 4) -> dict[str, np.ndarray]:
    """`image` uint8 (H, W, 3) -> {"image": uint8 (H // sf, W // sf, 3)}, as strong as in the paper."""
    return {"image": BSRGAN(image, sf)}


BSRGAN = Degradation()


def gaussian_kernel(size: int, widths: tuple[float, float], angle: float = 0.0, shift: float = 0.0) -> np.ndarray:
    """Kernel that sums to 1, (size, size) float32; `size` is odd.

    widths: standard deviations along its two axes, in pixels. angle: between its first axis and the x axis, in radians.
    shift: of its center to the right and down, in pixels.
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(f"kernel size {size}: must be odd")
    offsets = np.arange(size) - size // 2 - shift
    x, y = np.meshgrid(offsets, offsets)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    first, second = (max(width, 1e-3) for width in widths)  # width 0 is one pixel
    exponent = -0.5 * ((along / first) ** 2 + (across / second) ** 2)
    kernel = np.exp(exponent - exponent.max())
    return (kernel / kernel.sum()).astype(np.float32)


def blur(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """`image` (H, W, 3) filtered with the kernel, reflected at the borders -> (H, W, 3)."""
    cv2 = load_cv2()
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)


def resize(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """`x` resized by a random filter (bilinear, bicubic or area) -> (height, width, 3) in [0, 1]."""
    cv2 = load_cv2()
    interpolation = random.choice((cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA))
    return np.clip(cv2.resize(x, (width, height), interpolation=interpolation), 0.0, 1.0)


def add_noise(x: np.ndarray, level: float, largest: float) -> np.ndarray:
    """`x` with Gaussian noise -> (H, W, 3) in [0, 1].

    40 % gray noise and 40 % color noise of standard deviation `level`, else noise with a random covariance of the
    channels, whose largest variance is `largest` squared (section 3.3).
    """
    kind = random.random()
    if kind < 0.4:
        noise = np.random.normal(0.0, level, (*x.shape[:2], 1))
    elif kind < 0.8:
        noise = np.random.normal(0.0, level, x.shape)
    else:
        axes, _ = np.linalg.qr(np.random.normal(size=(3, 3)))
        scales = largest * np.sqrt(np.random.random(3))
        noise = np.random.normal(size=x.shape) * scales @ axes.T  # covariance: axes diag(scales^2) axes^T
    return np.clip(x + noise, 0.0, 1.0).astype(np.float32)


def compress(x: np.ndarray, quality: int) -> np.ndarray:
    """`x` (H, W, 3) in [0, 1] after JPEG compression of that quality."""
    cv2 = load_cv2()
    _, code = cv2.imencode(".jpg", to_levels(x)[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(code, cv2.IMREAD_COLOR)[:, :, ::-1].astype(np.float32) / LEVELS


def to_levels(x: np.ndarray) -> np.ndarray:
    """[0, 1] -> uint8, rounded."""
    return np.clip(np.rint(x * LEVELS), 0, LEVELS).astype(np.uint8)


def _odd(sizes: tuple[int, int]) -> int:
    """Random odd number from sizes[0] to sizes[1]."""
    return 2 * random.randint(sizes[0] // 2, sizes[1] // 2) + 1
