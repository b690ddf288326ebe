"""Means and statistics over the ranks of a distributed training."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
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


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization with the statistics of all ranks' samples; unlike nn.SyncBatchNorm on every device."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or number_of_ranks() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        count = input.new_tensor(float(input.numel() // input.shape[1]), dtype=torch.float32)
        x, counts = input.float(), float(rank_weight() > 0)  # a batch that only fills the last round does not count
        sums = dist_nn.all_reduce(torch.cat([counts * x.sum(dim=(0, 2, 3)), counts * count[None]]))
        mean, n = sums[:-1] / sums[-1], sums[-1].detach()
        centered = x - mean[:, None, None]  # (B, C, H, W)
        var = dist_nn.all_reduce(counts * centered.square().sum(dim=(0, 2, 3))) / n
        self._update_running(mean.detach(), var.detach() * n / (n - 1).clamp(min=1))
        out = centered * (var + self.eps).rsqrt()[:, None, None]
        if self.affine:
            out = out * self.weight[:, None, None] + self.bias[:, None, None]
        return out.to(input.dtype)

    def _update_running(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(var.to(self.running_var), momentum)
