"""The scale of latents: `scale_by_std` of latent diffusion."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ldm.rng import torch_generators_kept

logger = logging.getLogger(__name__)

BATCHES = 8  # one batch gives a factor that is off by a few percent; eight are close and still quick


@torch.no_grad()
def measure_latent_std(model: Any, batches: Iterable[Any]) -> Tensor:
    """Standard deviation of the model's unscaled latents over the first batches of every rank, a scalar that all ranks share.

    (LDM, arXiv 2112.10752, appendix G: latents of KL-regularised first stages are divided by it.)
    """
    sums = torch.zeros(3, dtype=torch.float64, device="cpu")  # count, sum, sum of squares
    with torch_generators_kept(model.device):  # measuring leaves training's random numbers where they were
        for batch in islice(iter(batches), BATCHES):
            x = model.get_pictures(batch, model.first_stage_key)
            z = model.get_first_stage_encoding(model.encode_first_stage(x)).cpu().double()
            sums += torch.tensor([z.numel(), float(z.sum()), float(z.square().sum())], dtype=torch.float64)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gathered = sums.float().to(model.device)  # not every backend reduces float64
        torch.distributed.all_reduce(gathered)
        sums = gathered.cpu().double()
    count, total, squares = sums.tolist()
    if count < 2:
        raise ValueError("scale_by_std: the training data gave no batch to measure")
    std = ((squares - total**2 / count) / (count - 1)) ** 0.5
    logger.info("latents have std %.5f over %d values: scale_factor %.6f", std, int(count), 1 / std)
    return torch.tensor(std, dtype=torch.float32, device=model.device)
