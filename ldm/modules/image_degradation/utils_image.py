"""The published image helpers: reading and writing, number formats, color, MATLAB's bicubic resize, PSNR."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.modules.image_degradation.bsrgan import LEVELS, to_levels

YCBCR = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]])  # BT.601, of RGB


def mkdir(path: str | os.PathLike) -> None:
    Path(path).mkdir(parents=True, exist_ok=True)


def mkdirs(paths: str | Iterable[str]) -> None:
    for path in [paths] if isinstance(paths, str) else paths:
        mkdir(path)


def imread_uint(path: str | os.PathLike, n_channels: int = 3) -> np.ndarray:
    """Return the image of a file, uint8 (H, W, 3) RGB, or (H, W, 1) with `n_channels` 1."""
    if n_channels not in (1, 3):
        raise ValueError(f"n_channels {n_channels}: choose 1 or 3")
    with Image.open(path) as image:
        array = np.array(image.convert("L" if n_channels == 1 else "RGB"))
    return array if array.ndim == 3 else array[:, :, None]


def imsave(img: np.ndarray, img_path: str | os.PathLike) -> None:
    """Write an image, uint8 (H, W, 3) RGB or (H, W[, 1])."""
    Image.fromarray(np.squeeze(img)).save(img_path)


imwrite = imsave


def uint2single(img: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [0, 1]."""
    return (img / LEVELS).astype(np.float32)


def single2uint(img: np.ndarray) -> np.ndarray:
    """Float in [0, 1] -> uint8, rounded."""
    return to_levels(img)


def single2tensor3(img: np.ndarray) -> Tensor:
    """(H, W, C) -> float32 (C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(img)).permute(2, 0, 1).float()


def single2tensor4(img: np.ndarray) -> Tensor:
    """(H, W, C) -> float32 (1, C, H, W)."""
    return single2tensor3(img)[None]


def uint2tensor3(img: np.ndarray) -> Tensor:
    """uint8 (H, W[, C]) -> float32 (C, H, W) in [0, 1]."""
    return single2tensor3(img if img.ndim == 3 else img[:, :, None]).div(LEVELS)


def uint2tensor4(img: np.ndarray) -> Tensor:
    """uint8 (H, W[, C]) -> float32 (1, C, H, W) in [0, 1]."""
    return uint2tensor3(img)[None]


def tensor2single(img: Tensor) -> np.ndarray:
    """([1, ]C, H, W) -> float32 (H, W[, C])."""
    array = img.detach().squeeze().float().cpu().numpy()
    return array.transpose(1, 2, 0) if array.ndim == 3 else array


def tensor2uint(img: Tensor) -> np.ndarray:
    """([1, ]C, H, W) in [0, 1], clipped -> uint8 (H, W[, C]), rounded."""
    return to_levels(tensor2single(img))


def modcrop(img_in: np.ndarray, scale: int) -> np.ndarray:
    """Crop (H, W[, C]) at the bottom and the right to multiples of `scale`."""
    height, width = (side // scale * scale for side in img_in.shape[:2])
    return img_in[:height, :width].copy()


def rgb2ycbcr(img: np.ndarray, only_y: bool = True) -> np.ndarray:
    """RGB uint8, or float in [0, 1], (H, W, 3) -> Y (H, W) or YCbCr (H, W, 3) of that dtype, as MATLAB's."""
    levels = img.astype(np.float64) if img.dtype == np.uint8 else img * LEVELS
    out = levels @ YCBCR.T / LEVELS + (16.0, 128.0, 128.0)
    out = out[..., 0] if only_y else out
    return np.rint(out).astype(np.uint8) if img.dtype == np.uint8 else (out / LEVELS).astype(img.dtype)


def calculate_psnr(img1: np.ndarray, img2: np.ndarray, border: int = 0) -> float:
    """Return the PSNR in dB of two images (H, W[, C]) with values in [0, 255], without a border of that many pixels."""
    if img1.shape != img2.shape:
        raise ValueError(f"images of shapes {img1.shape} and {img2.shape} cannot be compared")
    inner = (slice(border, img1.shape[0] - border), slice(border, img1.shape[1] - border))
    mse = np.mean((img1[inner].astype(np.float64) - img2[inner]) ** 2)
    return float("inf") if mse == 0 else float(20 * np.log10(LEVELS / np.sqrt(mse)))


def imresize_np(img: np.ndarray, scale: float, antialiasing: bool = True) -> np.ndarray:
    """Return (H, W[, C]) resized by MATLAB's bicubic `imresize`: float32 (ceil(H * scale), ceil(W * scale)[, C])."""
    rows, columns = (_resize_matrix(side, scale, antialiasing) for side in img.shape[:2])
    return np.einsum("ih,hw...,jw->ij...", rows, img.astype(np.float64), columns, optimize=True).astype(np.float32)


def imresize(img: Tensor, scale: float, antialiasing: bool = True) -> Tensor:
    """The same for a tensor ([C, ]H, W)."""
    array = img.detach().cpu().numpy()
    out = imresize_np(array if array.ndim == 2 else array.transpose(1, 2, 0), scale, antialiasing)
    return torch.from_numpy(out if out.ndim == 2 else np.ascontiguousarray(out.transpose(2, 0, 1)))


def bicubic_degradation(x: np.ndarray, sf: int = 3) -> np.ndarray:
    """Return x (H, W, C) downsampled by `sf` with MATLAB's bicubic filter."""
    return imresize_np(x, 1 / sf)


def _resize_matrix(size: int, scale: float, antialiasing: bool) -> np.ndarray:
    """Weights of the input pixels for each output pixel, (ceil(size * scale), size); borders are mirrored."""
    stretch = min(scale, 1.0) if antialiasing else 1.0  # a wider filter when downsampling
    length, width = int(np.ceil(size * scale)), 4.0 / stretch
    center = (np.arange(length) + 0.5) / scale - 0.5
    index = np.floor(center - width / 2)[:, None].astype(int) + np.arange(int(np.ceil(width)) + 2)
    x = np.abs(center[:, None] - index) * stretch
    weights = np.where(
        x <= 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0)
    )  # Keys' cubic kernel with a = -0.5
    weights /= weights.sum(axis=1, keepdims=True)
    index %= 2 * size
    matrix = np.zeros((length, size))
    np.add.at(matrix, (np.arange(length)[:, None], np.where(index < size, index, 2 * size - 1 - index)), weights)
    return matrix
