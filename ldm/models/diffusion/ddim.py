"""The published module of `DDIMSampler`."""

from ldm.models.diffusion.samplers.ddim import DDIMSampler as DDIMSampler
from ldm.published import published_names

__getattr__ = published_names(__name__)
