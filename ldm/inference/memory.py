"""Decoding by memory: how many latents of a batch the first stage decodes at a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.allocator import kept_memory
from ldm.modules.dtype import weights_dtype

logger = logging.getLogger(__name__)

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_COPIES = 5  # of the widest activation: a residual block's input, normalization, convolutions and their workspace


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process can still allocate on a device: of a GPU, or of the RAM; None if unknown.

    On the CPU: memory that Linux calls available, within the process's control groups, and what the process keeps.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own cache
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        meminfo = (_PROC / "meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    available = re.search(r"^MemAvailable: +(\d+) kB$", meminfo, re.MULTILINE)
    if available is None or device.type != "cpu":
        return None
    return max(0, min([int(available[1]) * 1024, *_left_by_cgroups()])) + kept_memory()


def _left_by_cgroups() -> Iterator[int]:
    """Bytes that each limit of the process's control groups (version 2) leaves; pages of files can be dropped."""
    try:
        own = re.search(r"^0::/(.*)$", (_PROC / "self/cgroup").read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, ValueError):
        own = None
    for group in (_CGROUPS / own[1], *(_CGROUPS / own[1]).parents) if own else ():
        with suppress(OSError, ValueError):  # no such file above the first group; "max": no limit
            limit, stat = (int((group / "memory.max").read_text()), (group / "memory.stat").read_text())
            files = sum(map(int, re.findall(r"^(?:in)?active_file (\d+)$", stat, re.MULTILINE)))
            yield limit - int((group / "memory.current").read_text()) + files


def decoder_bytes(decoder: Any, height: int, width: int, dtype: torch.dtype) -> int | None:
    """Peak memory in bytes of decoding a latent of height x width cells, estimated; None for an unknown decoder.

    It is reached at the image's resolution, in the block that gets the channels of the level below.
    """
    try:
        channels, factor = decoder.up[0].block[0].in_channels, 2 ** (len(decoder.up) - 1)
    except (AttributeError, IndexError, TypeError):
        return None
    return _COPIES * channels * height * factor * width * factor * dtype.itemsize


def decoded_at_once(model: Any, z: Tensor, dtype: torch.dtype | None = None) -> int:
    """Number of latents z (B, c, h, w) that the model decodes at a time: all, or as many as fit the free memory.

    dtype: of the computation under autocast; None: the first stage's. Logs one line if it is not all.
    """
    stage = getattr(model, "first_stage_model", None)
    used = dtype or (None if stage is None else weights_dtype(stage))
    tiles = getattr(model, "tiling", None)  # of a TiledModel
    height, width = (min(pair) for pair in zip(z.shape[2:], tiles.size if tiles is not None else z.shape[2:]))
    each = decoder_bytes(getattr(stage, "decoder", None), height, width, used or torch.float32)
    free = None if each is None else free_memory(z.device)
    if free is None or each is None or each * len(z) <= free:
        return len(z)
    count = max(1, free // each)
    text = "decoding %d of %d images at a time: an image takes about %.1f GB, and %.1f GB are free"
    if each > free and tiles is None:
        text += "; tiles need less (--tiled or --tile)"
    logger.info(text, count, len(z), each / 1e9, free / 1e9)
    return count
