"""The samplers by name, and what each supports.

The literal attributes of the classes are read from their source: `--help` and flag checks do not import torch.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ldm.config.signature import class_attributes

if TYPE_CHECKING:  # plain imports would load torch
    from ldm.models.diffusion.samplers.base import Sampler
    from ldm.models.diffusion.samplers.denoiser import DiffusionModel


@dataclass(frozen=True)
class SamplerEntry:
    """A sampler's dotted class name, and the attributes of the class (see `base.Sampler`)."""

    target: str
    spacings: tuple[str, ...]
    default_eta: float
    takes_eta: bool
    adds_noise: bool
    continuous_time: bool

    @classmethod
    def of(cls, target: str) -> SamplerEntry:
        attributes = class_attributes(target)
        return cls(target, *(attributes[field.name] for field in fields(cls)[1:]))


_CLASSES = {
    "ddim": "ddim.DDIMSampler",
    "plms": "plms.PLMSSampler",
    "ancestral": "ancestral.AncestralSampler",
    "dpm_solver": "dpm_solver.DPMSolverSampler",
    "dpm_solver_3m": "dpm_solver.DPMSolver3MSampler",
    "dpm_solver_2s": "dpm_solver.DPMSolver2SSampler",
    "dpm_solver_3s": "dpm_solver.DPMSolver3SSampler",
    "unipc": "unipc.UniPCSampler",
    "euler": "karras.EulerSampler",
    "euler_ancestral": "karras.EulerAncestralSampler",
    "heun": "karras.HeunSampler",
    "dpmpp_2m": "karras.DPMPP2MSampler",
    "dpmpp_2m_sde": "karras.DPMPP2MSDESampler",
    "lcm": "lcm.LCMSampler",
}
SAMPLERS = {name: SamplerEntry.of(f"ldm.models.diffusion.samplers.{path}") for name, path in _CLASSES.items()}


def make_sampler(name: str, model: DiffusionModel, **options: Any) -> Sampler:
    """Build the sampler of that name for `model`; `options` are further constructor arguments."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    module, _, cls = SAMPLERS[name].target.rpartition(".")
    return getattr(importlib.import_module(module), cls)(model, **options)
