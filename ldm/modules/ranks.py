"""Means and statistics over the ranks of a distributed training."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.rng import current_samples


def number_of_ranks() -> int:
    """Return the number of ranks that train together, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank_weight() -> float:
    """Return the weight of this rank's batch in a mean over the ranks: 1 if all have equally many samples."""
    samples = current_samples()
    return 1.0 if samples is None else samples.weight


def average_over_ranks(x: Tensor, weight: float = 1.0) -> Tensor:
    """Return the mean of x * weight over the ranks, float32 without gradient; x has the same shape on all of them."""
    x = x.detach().float() * weight
    if number_of_ranks() > 1:
        dist.all_reduce(x)
        x /= number_of_ranks()
    return x


class _Normalize(torch.autograd.Function):
    """Standardize the channels of x (B, C, H, W) by the mean and variance of all ranks.

    The sums are in float64, as PyTorch's on the CPU: gradients of a discriminator nearly cancel in them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, counts: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (standardized x, mean (C,), variance (C,), number of values n); `counts`: whether x is one of them."""
        own = x.new_full((1,), float(x.numel() // x.shape[1]), dtype=torch.float64)
        sums = torch.cat([x.sum(dim=(0, 2, 3), dtype=torch.float64), own]) * float(counts)
        dist.all_reduce(sums)
        mean, n = sums[:-1] / sums[-1], sums[-1]
        centered = x - mean.to(x.dtype)[:, None, None]
        squares = centered.square().sum(dim=(0, 2, 3), dtype=torch.float64) * float(counts)
        dist.all_reduce(squares)
        var = squares / n
        inverse = (var + eps).rsqrt().to(x.dtype)[:, None, None]
        out = centered * inverse
        ctx.save_for_backward(out, inverse, n)
        ctx.counts = counts
        ctx.mark_non_differentiable(mean, var, n)
        return out, mean, var, n

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        out, inverse, n = ctx.saved_tensors
        sums = torch.stack([each.sum(dim=(0, 2, 3), dtype=torch.float64) for each in (gradient, gradient * out)])
        dist.all_reduce(sums)
        if not ctx.counts:
            return gradient * inverse, None, None
        mean, slope = (sums / n).to(out.dtype)[:, :, None, None]
        return (gradient - mean - out * slope) * inverse, None, None


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization with the statistics of all ranks' samples; unlike nn.SyncBatchNorm on every device."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or number_of_ranks() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        # A batch that only fills the last round does not count.
        x, mean, var, n = _Normalize.apply(input.float(), self.eps, rank_weight() > 0)
        self._update_running(mean, var * n / (n - 1).clamp(min=1))
        if self.affine:
            x = x * self.weight[:, None, None] + self.bias[:, None, None]
        return x.to(input.dtype)

    def _update_running(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(var.to(self.running_var), momentum)
