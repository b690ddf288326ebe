"""The samplers by name, for command lines and settings: what each is and takes, known without importing torch."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.models.diffusion.samplers.base import Sampler

PACKAGE = "ldm.models.diffusion.samplers"
DISCRETE = ("uniform", "quad", "trailing")
CONTINUOUS = ("uniform", "logsnr", "karras", "trailing")


@dataclass(frozen=True)
class SamplerEntry:
    """One sampler: its class, what its constructor gets beside the model, and what a run may ask of it."""

    target: str  # dotted name of the class
    about: str
    grids: tuple[str, ...] = CONTINUOUS  # what `ddim_discretize` may be, the default first
    default_eta: float = 0.0
    takes_eta: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


SAMPLERS: dict[str, SamplerEntry] = {
    "ddim": SamplerEntry(f"{PACKAGE}.ddim.DDIMSampler", "DDIM, the published default", DISCRETE, 0.0, True),
    "plms": SamplerEntry(f"{PACKAGE}.plms.PLMSSampler", "PLMS, linear multistep of order 4", DISCRETE),
    "ancestral": SamplerEntry(f"{PACKAGE}.ancestral.AncestralSampler", "DDPM's own noisy chain", DISCRETE, 1.0),
    "dpm_solver": SamplerEntry(f"{PACKAGE}.dpm_solver.DPMSolverSampler", "DPM-Solver++ 2M"),
    "dpm_solver_3m": SamplerEntry(f"{PACKAGE}.dpm_solver.DPMSolverSampler", "DPM-Solver++ 3M", options={"order": 3}),
    "dpm_solver_2s": SamplerEntry(
        f"{PACKAGE}.dpm_solver.DPMSolverSampler",
        "DPM-Solver++ 2S, single-step",
        options={"order": 2, "method": "singlestep"},
    ),
    "dpm_solver_3s": SamplerEntry(
        f"{PACKAGE}.dpm_solver.DPMSolverSampler",
        "DPM-Solver++ 3S, single-step",
        options={"order": 3, "method": "singlestep"},
    ),
    "unipc": SamplerEntry(f"{PACKAGE}.unipc.UniPCSampler", "UniPC of order 2"),
    "euler": SamplerEntry(f"{PACKAGE}.karras.EulerSampler", "Euler"),
    "euler_ancestral": SamplerEntry(
        f"{PACKAGE}.karras.EulerAncestralSampler", "Euler with fresh noise", CONTINUOUS, 1.0, True
    ),
    "heun": SamplerEntry(f"{PACKAGE}.karras.HeunSampler", "Heun, two network calls a step"),
    "dpmpp_2m": SamplerEntry(f"{PACKAGE}.karras.DPMPP2MSampler", "DPM++ 2M of k-diffusion"),
    "dpmpp_2m_sde": SamplerEntry(
        f"{PACKAGE}.karras.DPMPP2MSDESampler", "DPM++ 2M SDE of k-diffusion", CONTINUOUS, 1.0, True
    ),
    "lcm": SamplerEntry(
        f"{PACKAGE}.lcm.LCMSampler", "few steps of a latent consistency model", ("uniform", "trailing"), 1.0
    ),
}


def check_request(name: str, S: int, num_timesteps: int, eta: float | None = None, discretize: str = "uniform") -> None:
    """ValueError where the sampler of that name cannot honour a run, known before any model is loaded; `eta` None is its own."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    entry = SAMPLERS[name]
    if not 1 <= S <= num_timesteps:
        raise ValueError(f"{S} sampling steps: choose 1 to {num_timesteps}, the length of this model's noise schedule")
    if discretize not in entry.grids:
        raise ValueError(f"grid {discretize!r}: {name} has no such grid, choose one of {', '.join(entry.grids)}")
    if eta is not None and not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta {eta}: choose 0 (deterministic) to 1 (as noisy as the diffusion itself)")
    if eta is not None and eta != entry.default_eta and not entry.takes_eta:
        takers = ", ".join(other for other, choice in SAMPLERS.items() if choice.takes_eta)
        raise ValueError(
            f"eta {eta:g}: {name} has a noise of its own, eta {entry.default_eta:g}; others take any: {takers}"
        )


def make_sampler(name: str, model: Any, **options: Any) -> Sampler:
    """The sampler of that name over `model`; `options` replace those of its entry."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    module, _, cls = SAMPLERS[name].target.rpartition(".")
    return getattr(importlib.import_module(module), cls)(model, **{**SAMPLERS[name].options, **options})
