"""The published small helpers, and `instantiate_from_config` under its published name."""

from __future__ import annotations

import inspect
import traceback
from typing import TYPE_CHECKING, Any, TypeVar

from ldm.config.instantiate import allow_targets as allow_targets
from ldm.config.instantiate import get_obj_from_str as get_obj_from_str
from ldm.config.instantiate import instantiate_from_config as instantiate_from_config

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")


def import_lightning() -> Any:
    """pytorch_lightning, which imports torchvision wherever that is installed (by way of torchmetrics).

    ImportError says what mends it where the two do not fit together.
    """
    try:
        import pytorch_lightning
    except Exception as error:
        if "torchvision" not in "".join(traceback.format_exception(error)):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImportError(
            f"torchvision does not fit this torch ({reason}), and Lightning imports it where it is there: pip install --upgrade torch "
            f"torchvision, or pip uninstall torchvision, which only retrieval needs"
        ) from error
    return pytorch_lightning


def exists(x: Any) -> bool:
    """Whether `x` is anything but None."""
    return x is not None


def default(value: T | None, fallback: Any) -> T:
    """`value`, or where it is None the fallback (called, if it is a function)."""
    if value is not None:
        return value
    return fallback() if inspect.isfunction(fallback) else fallback


def ismap(x: Any) -> bool:
    """Whether `x` is a batch of maps: (B, C, H, W) with more than three channels."""
    return _is_tensor(x) and x.ndim == 4 and x.shape[1] > 3


def isimage(x: Any) -> bool:
    """Whether `x` is a batch of pictures: (B, C, H, W) with one or three channels."""
    return _is_tensor(x) and x.ndim == 4 and x.shape[1] in (1, 3)


def _is_tensor(x: Any) -> bool:
    import torch

    return torch.is_tensor(x)


def mean_flat(tensor: Tensor) -> Tensor:
    """(B, ...) -> (B,), the mean over all axes but the first."""
    return tensor.mean(dim=list(range(1, tensor.ndim)))


def count_params(model: nn.Module, verbose: bool = False) -> int:
    """Number of parameters of `model`; `verbose` logs it in millions."""
    total = sum(p.numel() for p in model.parameters())
    if verbose:
        import logging

        logging.getLogger(__name__).info("%s has %.2f M parameters", type(model).__name__, total * 1e-6)
    return total


def log_txt_as_img(wh: tuple[int, int], xc: list[str], size: int = 10) -> Tensor:
    """Texts as pictures for image logs: list of B strings -> (B, 3, wh[1], wh[0]) in [-1, 1]."""
    import numpy as np
    import torch

    from ldm.visualize import text_image

    pictures = [
        np.asarray(text_image(wh, text, font_size=size).convert("RGB"), dtype=np.float32) / 127.5 - 1.0 for text in xc
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
