"""The published module of `DDIMSampler`."""

from ldm.models.diffusion.samplers.ddim import DDIMSampler as DDIMSampler
