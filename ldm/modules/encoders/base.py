"""What every encoder of a condition has in common."""

from typing import Any

import torch
from torch import Tensor, nn


class AbstractEncoder(nn.Module):
    """What LatentDiffusion asks of a condition's encoder. Its device is that of its weights."""

    finds_own_weights = False  # True for an encoder with pretrained weights of its own, which a checkpoint may leave out

    def encode(self, inputs: Any) -> Tensor:
        """Inputs of the batch -> (B, L, D), or (B, C, h, w) for a spatial condition."""
        return self(inputs)

    def unconditional_input(self, batch_size: int) -> Any:
        """What stands for "no condition", in the form that `encode` takes, for condition dropout and guidance."""
        raise ValueError(f"{type(self).__name__} has no input that means 'no condition': train with cond_dropout 0, sample with scale 1")

    def ensure_weights(self) -> None:
        """Find the pretrained weights where no checkpoint has brought them. To be called before the first use, not while building."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
