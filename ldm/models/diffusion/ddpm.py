"""The published home of the diffusion models: `target: ldm.models.diffusion.ddpm.LatentDiffusion`."""

from ldm.models.diffusion.conditioning import DiffusionWrapper
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.layout2img import Layout2ImgDiffusion
from ldm.models.diffusion.pixel import DDPM
from ldm.models.diffusion.variants import (
    LatentDepth2ImageDiffusion,
    LatentFinetuneDiffusion,
    LatentInpaintDiffusion,
    LatentUpscaleDiffusion,
)

__all__ = [
    "DDPM",
    "DiffusionWrapper",
    "LatentDepth2ImageDiffusion",
    "LatentDiffusion",
    "LatentFinetuneDiffusion",
    "LatentInpaintDiffusion",
    "LatentUpscaleDiffusion",
    "Layout2ImgDiffusion",
]
