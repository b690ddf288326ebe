"""Depth estimation for depth-to-image models: DPT of the MiDaS family (Ranftl et al. 2021, arXiv 2103.13413)."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

logger = logging.getLogger(__name__)

MODEL_TYPES = ("dpt_large", "dpt_hybrid", "midas_v21", "midas_v21_small")  # the published names


class MiDaSInference(nn.Module):
    """Inverse depth (near is large) by transformers' DPT, loaded from a local folder at the first call.

    The network is not a submodule: checkpoints do not hold it.
    """

    def __init__(self, model_type: str = "dpt_hybrid", weights: str | Path | None = None) -> None:
        """model_type: published name, used in errors. weights: folder with config.json and model.safetensors."""
        super().__init__()
        if model_type not in MODEL_TYPES:
            raise ValueError(f"model_type {model_type!r}: choose one of {', '.join(MODEL_TYPES)}")
        self.model_type, self.weights = model_type, weights
        self._network: list[transformers.DPTForDepthEstimation] = []  # in a list, so that it is not registered

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) in [-1, 1] -> inverse depth (B, 1, H, W) in the network's own unit."""
        network = self._loaded()
        nn.Module.to(network, x.device)
        side = network.config.image_size
        assert isinstance(side, int)
        # The network was trained on images normalized with mean and std 0.5, which are in [-1, 1] too.
        pixels = F.interpolate(x.float(), (side, side), mode="bicubic", align_corners=False).clamp(-1.0, 1.0)
        depth = network(pixel_values=pixels).predicted_depth[:, None]  # (B, 1, side, side)
        return F.interpolate(depth, x.shape[2:], mode="bicubic", align_corners=False)

    def _loaded(self) -> transformers.DPTForDepthEstimation:
        if not self._network:
            if self.weights is None or not (Path(self.weights) / "config.json").is_file():
                problem = "weights is not set" if self.weights is None else f"{self.weights} has no config.json"
                raise ValueError(
                    f"depth estimation: {problem}. Set depth_stage_config.params.weights to a folder with "
                    f"transformers' DPT (Intel/dpt-hybrid-midas for {self.model_type}), or pass a depth map"
                )
            network = transformers.DPTForDepthEstimation.from_pretrained(
                self.weights, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
            self._network.append(network.requires_grad_(False).eval())
            logger.info("depth: loaded DPT from %s", self.weights)
        return self._network[0]
