"""Previews of an unfinished sample: decoded where that is cheap, else by a linear map from latents to colors."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm.inference.pipeline import Pipeline
from ldm.visualize import grid

MOST_IMAGES = 9  # of a batch in its preview
CHEAP = 1e9  # weights of the first stage times cells of the latents: about a tenth of a second on a CPU
SHOWN_SIDE = 480  # pixels, to which smaller previews are enlarged
FITTED_SIDE = 256  # pixels of the images that the linear map is fitted on

logger = logging.getLogger(__name__)


class Previews:
    """Makes the previews of one pipeline."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.model: Any = pipeline.model
        stage: nn.Module | None = getattr(pipeline.model, "first_stage_model", None)
        self.weights = 0 if stage is None else sum(parameter.numel() for parameter in stage.parameters())
        self.pipeline = pipeline
        self._colors: Tensor | None = None

    def __call__(self, x0: Tensor) -> Image.Image:
        """A grid of the first images of a batch, from predicted latents (B, c, h, w)."""
        x0 = x0[:MOST_IMAGES].nan_to_num()
        if self.weights * x0[:, 0].numel() <= CHEAP:
            decode = getattr(self.model, "decode_first_stage", lambda z: z)
            images = decode(x0).float()
        else:
            images = self.linear(x0.float())
        sheet = grid(list(images.clamp(-1.0, 1.0).cpu()), padding=1)
        scale = max(1.0, SHOWN_SIDE / max(sheet.size))
        return sheet.resize((round(scale * sheet.width), round(scale * sheet.height)), Image.Resampling.BICUBIC)

    def linear(self, z: Tensor) -> Tensor:
        """Latents (B, c, h, w) -> small images (B, 3, h, w) by the best linear map of colors."""
        if self._colors is None:
            self._colors = fit_colors(self.pipeline)
        with torch.autocast(z.device.type, enabled=False):
            return torch.einsum("bchw,cr->brhw", z, self._colors[:-1]) + self._colors[-1][:, None, None]


@torch.no_grad()
def fit_colors(pipeline: Pipeline) -> Tensor:
    """(c + 1, 3): weights and offset of the least-squares map from latents to their mean colors, on smooth images."""
    model: Any = pipeline.model
    generator = torch.Generator().manual_seed(0)
    fields = torch.rand((4, 3, 8, 8), generator=generator) * 2 - 1
    images = interpolate(fields, size=(FITTED_SIDE, FITTED_SIDE), mode="bicubic").clamp(-1.0, 1.0)
    encoded = [pipeline.encode(image[None].to(pipeline.device)) for image in images]
    latents = torch.cat([x if torch.is_tensor(x) else x.mode() for x in encoded])
    z = model.get_first_stage_encoding(latents).float().cpu()  # a tensor is scaled alone
    colors = interpolate(images, size=z.shape[2:], mode="area")
    rows = z.permute(0, 2, 3, 1).flatten(0, 2).numpy().astype(np.float64)
    rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    wanted = colors.permute(0, 2, 3, 1).flatten(0, 2).numpy()
    found = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return torch.from_numpy(found).float().to(pipeline.device)
