"""Scale of latents: `scale_by_std` of latent diffusion."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ldm.rng import BatchSamples, preserve_torch_rng, samples_set

logger = logging.getLogger(__name__)

BATCHES = 8  # one batch gives a factor that is off by a few percent; eight are close and still quick


@torch.no_grad()
def measure_latent_std(
    encode: Callable[[Any], Tensor],
    batches: Iterable[Any],
    device: torch.device,
    samples_of: Callable[[int], BatchSamples | None] = lambda number: None,
    number: int = BATCHES,
) -> Tensor:
    """Return the standard deviation of the unscaled latents `encode(batch)` of all ranks' first batches, a scalar.

    samples_of: returns the samples of the n-th batch, whose random numbers are used.

    (LDM, arXiv 2112.10752, appendix G: latents of KL-regularised first stages are divided by it.)
    """
    sums = torch.zeros(3, dtype=torch.float64, device="cpu")  # count, sum, sum of squares
    with preserve_torch_rng(device):  # the measurement does not change the random numbers of training
        for n, batch in enumerate(islice(batches, number)):
            samples = samples_of(n)
            if samples is not None and samples.weight == 0:
                continue
            with samples_set(samples):
                z = encode(batch).cpu().double()
            sums += torch.tensor([z.numel(), float(z.sum()), float(z.square().sum())], dtype=torch.float64)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gathered = sums.float().to(device)  # not every backend reduces float64
        torch.distributed.all_reduce(gathered)
        sums = gathered.cpu().double()
    count, total, squares = sums.tolist()
    if count < 2:
        raise ValueError("scale_by_std: the training data has no batch to measure")
    std = ((squares - total**2 / count) / (count - 1)) ** 0.5
    logger.info("%-11s std %.5f over %d values: scale_factor %.6f", "latents", std, int(count), 1 / std)
    return torch.tensor(std, dtype=torch.float32, device=device)
