"""Depth of a picture as depth-to-image models are conditioned on it: DPT of the MiDaS family (Ranftl et al. 2021, arXiv 2103.13413)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

MODEL_TYPES = ("dpt_large", "dpt_hybrid", "midas_v21", "midas_v21_small")  # the published names


class MiDaSInference(nn.Module):
    """Inverse depth, near is large, by transformers' DPT from a local folder, read at the first picture; nothing is ever downloaded.

    The network is no part of the module's weights: checkpoints stay without it, and what old ones hold of it is not read.
    """

    def __init__(self, model_type: str = "dpt_hybrid", weights: str | None = None) -> None:
        """model_type: as published, for the message that says what is missing. weights: folder with config.json and model.safetensors."""
        super().__init__()
        if model_type not in MODEL_TYPES:
            raise ValueError(f"model_type {model_type!r}: choose one of {', '.join(MODEL_TYPES)}")
        self.model_type, self.weights = model_type, weights
        self._network: tuple[Any, ...] = ()  # in a tuple, so that it is not registered as a part

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) in [-1, 1] -> inverse depth (B, 1, H, W) in the network's own unit."""
        network = self._loaded().to(x.device)
        side = int(network.config.image_size)
        resized = F.interpolate(x.float(), (side, side), mode="bicubic", align_corners=False).clamp(
            -1.0, 1.0
        )  # its mean and std are 0.5
        depth = network(pixel_values=resized).predicted_depth[:, None]  # (B, 1, side, side)
        return F.interpolate(depth, x.shape[2:], mode="bicubic", align_corners=False)

    def _loaded(self) -> nn.Module:
        if not self._network:
            if self.weights is None or not (Path(self.weights) / "config.json").is_file():
                where = "weights is not set" if self.weights is None else f"{self.weights} holds no config.json"
                raise ValueError(
                    f"a depth map has to be estimated, and {where}: give a folder with transformers' DPT (Intel/dpt-hybrid-midas for "
                    f"{self.model_type}) as depth_stage_config.params.weights, or give the depth map itself"
                )
            from transformers import DPTForDepthEstimation

            network = DPTForDepthEstimation.from_pretrained(
                self.weights, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
            self._network = (network.requires_grad_(False).eval(),)
            logger.info("depth: DPT of %s", self.weights)
        return self._network[0]
