"""Base class of trained modules: Lightning's, or a small one in a program that only samples.

Lightning imports torchmetrics, torchvision and torch's compiler, which takes seconds.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import nn

from ldm import cli

if TYPE_CHECKING or not cli.only_samples or "pytorch_lightning" in sys.modules:
    from pytorch_lightning import LightningModule as LightningModule
else:

    class LightningModule(nn.Module):
        """The part of Lightning's class of this name that sampling uses."""

        _trainer = None

        @property
        def device(self) -> torch.device:
            return next(self.parameters()).device

        @property
        def dtype(self) -> torch.dtype:
            return next(self.parameters()).dtype
