"""Dropping the condition of some training samples, for classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def drop_samples(raw: Any, null: Any, dropped: Tensor) -> Any:
    """`raw` with the samples where `dropped` (B,) is true taken from `null`, which has the same form.

    Handles lists of B items (captions), tensors (B, ...), and dicts of both (Ho & Salimans 2022, algorithm 1, line 3).
    """
    if isinstance(raw, Mapping):
        return {key: drop_samples(value, null[key], dropped) if key in null else value for key, value in raw.items()}
    if torch.is_tensor(raw):
        return torch.where(dropped.reshape(-1, *(1 for _ in raw.shape[1:])), null.to(raw.dtype), raw)
    return [empty if drop else item for item, empty, drop in zip(raw, null, dropped.tolist(), strict=True)]
