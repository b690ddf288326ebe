"""The published small helpers, and `instantiate_from_config` under its published name."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ldm.config.instantiate import allow_targets as allow_targets
from ldm.config.instantiate import get_obj_from_str as get_obj_from_str
from ldm.config.instantiate import instantiate_from_config as instantiate_from_config
from ldm.visualize import text_image

T = TypeVar("T")
logger = logging.getLogger(__name__)


def exists(x: Any) -> bool:
    return x is not None


def default(value: T | None, fallback: Any) -> T:
    """Return `value`, or if it is None the fallback (called if it is a function)."""
    if value is not None:
        return value
    return fallback() if inspect.isfunction(fallback) else fallback


def ismap(x: Any) -> bool:
    """True for a batch of maps: (B, C, H, W) with more than three channels."""
    return torch.is_tensor(x) and x.ndim == 4 and x.shape[1] > 3


def isimage(x: Any) -> bool:
    """True for a batch of images: (B, C, H, W) with one or three channels."""
    return torch.is_tensor(x) and x.ndim == 4 and x.shape[1] in (1, 3)


def mean_flat(tensor: Tensor) -> Tensor:
    """Mean over all axes but the first: (B, ...) -> (B,)."""
    return tensor.mean(dim=list(range(1, tensor.ndim)))


def count_params(model: nn.Module, verbose: bool = False) -> int:
    """Return the number of parameters of `model`; `verbose` logs it in millions."""
    total = sum(p.numel() for p in model.parameters())
    if verbose:
        logger.info("%s has %.2f M parameters", type(model).__name__, total * 1e-6)
    return total


def parallel_data_prefetch(
    func: Callable[..., Any],
    data: Any,
    n_proc: int,
    target_data_type: str = "ndarray",
    cpu_intensive: bool = True,
    use_worker_id: bool = False,
) -> Any:
    """Apply `func` to `n_proc` parts of `data` at once, in processes if `cpu_intensive` else in threads.

    data: an array, a list or another iterable; with `use_worker_id` func gets [number of the part, part].
    Returns one array, with "list" one list, otherwise the list of results.
    """
    if n_proc < 1:
        raise ValueError(f"n_proc {n_proc}: must be at least 1")
    rows = data if isinstance(data, np.ndarray) else list(data.values() if isinstance(data, Mapping) else data)
    size = max(1, -(-len(rows) // n_proc))
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    work = [[number, part] for number, part in enumerate(parts)] if use_worker_id else parts
    pool = ProcessPoolExecutor if cpu_intensive else ThreadPoolExecutor
    with pool(n_proc) as executor:
        results = list(executor.map(func, work))
    if target_data_type == "ndarray":
        return np.concatenate([np.asarray(result) for result in results], axis=0)
    return [item for result in results for item in result] if target_data_type == "list" else results


def log_txt_as_img(wh: tuple[int, int], xc: list[str], size: int = 10) -> Tensor:
    """Render texts for image logs: list of B strings -> (B, 3, wh[1], wh[0]) in [-1, 1]."""
    images = [np.asarray(text_image(wh, text, font_size=size).convert("RGB"), dtype=np.float32) for text in xc]
    return torch.from_numpy(np.stack(images) / 127.5 - 1.0).permute(0, 3, 1, 2).contiguous()
