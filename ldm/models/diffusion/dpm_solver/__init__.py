"""The published package of `DPMSolverSampler`."""

from ldm.models.diffusion.samplers.dpm_solver import DPMSolverSampler as DPMSolverSampler
