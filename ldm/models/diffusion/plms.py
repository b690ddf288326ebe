"""The published module of `PLMSSampler`."""

from ldm.models.diffusion.samplers.plms import PLMSSampler as PLMSSampler
from ldm.published import published_names

__getattr__ = published_names(__name__)
