"""The published package of `DPMSolverSampler`."""

from ldm.models.diffusion.samplers.dpm_solver.sampler import DPMSolverSampler as DPMSolverSampler
