"""What every encoder of a condition has in common."""

from typing import Any

import torch
from torch import Tensor, nn


class AbstractEncoder(nn.Module):
    """What LatentDiffusion asks of a condition's encoder. Its device is that of its weights."""

    pad_id: int | None = None  # of an encoder of CLIP's tokens: what follows the end token; None: that token again
    finds_own_weights = (
        False  # True for an encoder with pretrained weights of its own, which a checkpoint may leave out
    )

    def encode(self, inputs: Any) -> Tensor:
        """Inputs of the batch -> (B, L, D), or (B, C, h, w) for a spatial condition."""
        return self(inputs)

    def unconditional_input(self, batch_size: int) -> Any:
        """What stands for "no condition", in the form that `encode` takes, for condition dropout and guidance."""
        raise ValueError(
            f"{type(self).__name__} has no input that means 'no condition': train with cond_dropout 0, sample with scale 1"
        )

    def ensure_weights(self) -> None:
        """Find the pretrained weights where no checkpoint has brought them. To be called before the first use, not while building."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class PretrainedEncoder(AbstractEncoder):
    """An encoder whose weights come with the loaded checkpoint, or else from `load_pretrained`; `freeze` keeps it from training."""

    finds_own_weights = True

    def __init__(self) -> None:
        super().__init__()
        self.has_weights, self.frozen = False, False
        self.register_load_state_dict_pre_hook(self._note_weights)

    def load_pretrained(self) -> None:
        """Read the weights from a local place, else from the hub. CheckpointError, in one line, where that fails."""
        raise NotImplementedError

    def ensure_weights(self) -> None:
        if not self.has_weights:
            self.load_pretrained()

    def freeze(self) -> None:
        """No gradients, and evaluation mode whatever the parent does."""
        self.requires_grad_(False)
        self.frozen = True
        self.eval()

    def train(self, mode: bool = True) -> "PretrainedEncoder":
        return super().train(mode and not self.frozen)

    @staticmethod
    def _note_weights(module: "PretrainedEncoder", state: dict[str, Any], prefix: str, *_: Any) -> None:
        module.has_weights |= any(name.startswith(prefix) and name.endswith(".weight") for name in state)
