"""The published module of `PLMSSampler`."""

from ldm.models.diffusion.samplers.plms import PLMSSampler as PLMSSampler
