"""Batches by memory: how many images are sampled, and how many latents the first stage decodes at a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.inference.settings import AUTO
from ldm.machine.allocator import kept_memory
from ldm.modules.dtype import weights_dtype

logger = logging.getLogger(__name__)

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_COPIES = 5  # of the widest activation: a residual block's input, normalization, convolutions and their workspace
_NETWORK_COPIES = 7  # of the widest activation, fitted to measured peaks; living tensors alone are 3.3 to 3.9
_FEED_FORWARD = 8  # hidden values of a transformer's gated feed-forward, for each of its input


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


def known_free_memory(device: torch.device) -> int:
    """`free_memory`; raise ValueError if it is unknown."""
    free = free_memory(device)
    if free is None:
        raise ValueError(f"--n_samples {AUTO}: the free memory of {device} is unknown; pass a number")
    return free


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


def encoder_bytes(encoder: Any, height: int, width: int, dtype: torch.dtype) -> int:
    """Peak memory in bytes of encoding an image of height x width pixels, estimated; 0 for an unknown encoder."""
    try:
        channels = encoder.down[0].block[0].out_channels
    except (AttributeError, IndexError, TypeError):
        return 0
    return _COPIES * channels * height * width * dtype.itemsize


def network_bytes(unet: Any, height: int, width: int, dtype: torch.dtype) -> int:
    """Peak memory in bytes of a UNetModel's call for a latent of height x width cells, estimated.

    The widest activation is the hidden layer of a transformer's feed-forward, or the input of the last level's first
    block, with its skip connection.
    """
    first, second = (*unet.channel_mult, unet.channel_mult[-1])[:2]
    levels = [
        (mult, 2**level) for level, mult in enumerate(unet.channel_mult) if 2**level in unet.attention_resolutions
    ]
    widest = max([first + second, *(_FEED_FORWARD * mult / down**2 for mult, down in levels)])
    return int(_NETWORK_COPIES * widest * unet.model_channels * height * width) * dtype.itemsize


def batch_by_memory(pipeline: Any, request: Any, most: int, encodes: bool = False) -> int:
    """Number of images, up to `most` and at least 1, that a pipeline samples at a time in the free memory.

    request: a checked one. encodes: the first stage encodes as many images, too. Logs the estimate.
    Raises ValueError as `known_free_memory`.
    """
    model, (_, height, width), free = pipeline.model, request.latent_shape, known_free_memory(pipeline.device)
    predictions = 1 + request.guided + (request.image_scale != 1.0)  # in one call of the network
    networks = 1 + getattr(request, "controls", 0)  # whose outputs stay until the UNet has used them
    used = pipeline.dtype or weights_dtype(model.model) or torch.float32
    each = predictions * networks * network_bytes(model.model.diffusion_model, height, width, used)
    if encodes:
        tall, wide = (min(side, request.tiled or side) for side in request.size)
        stage = model.first_stage_model
        each = max(
            each, encoder_bytes(getattr(stage, "encoder", None), tall, wide, weights_dtype(stage) or torch.float32)
        )
    count = int(min(most, max(1, free // each)))
    text = "batches of %d: an image takes about %.2g GB, %.2g GB are free, and at most %d are sampled at a time"
    logger.info(text, count, each / 1e9, free / 1e9, most)
    return count


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
