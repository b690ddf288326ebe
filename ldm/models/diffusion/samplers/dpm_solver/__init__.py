"""DPM-Solver++."""

from ldm.models.diffusion.samplers.dpm_solver.sampler import DPMSolverSampler

__all__ = ["DPMSolverSampler"]
