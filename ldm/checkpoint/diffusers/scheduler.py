"""The noise schedule as diffusers' scheduler_config.json, where the published `linear` is `scaled_linear` and `sqrt_linear` is `linear`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.checkpoint.diffusers.rules import InterchangeError
from ldm.config.beta_schedule import make_beta_schedule

SCHEDULERS = {"ddim": "DDIMScheduler", "pndm": "PNDMScheduler"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
COSINE_S = 8e-3  # the only one that squaredcos_cap_v2 knows
_COMPARED = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
_DEFAULTS = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2}
_DEFAULTS |= {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}


def scheduler_config(params: Mapping[str, Any], name: str = "ddim") -> dict[str, Any]:
    """scheduler_config.json of a diffusion model with the `params` of its YAML.

    name: ddim, or pndm (PLMS). Steps are this framework's: 1, 1 + T/S, ..., and the last one goes to alphas_cumprod[0], not to 1; with a
    zero terminal SNR they end at T - 1.
    """
    if name not in SCHEDULERS:
        raise InterchangeError(f"--scheduler {name}: choose one of {', '.join(SCHEDULERS)}")
    zero_snr = bool(params.get("zero_terminal_snr"))
    if zero_snr and name != "ddim":
        raise InterchangeError(f"--scheduler {name}: a schedule with zero terminal SNR needs ddim")
    config = {
        "_class_name": SCHEDULERS[name],
        **_betas_of(params),
        "prediction_type": PREDICTIONS[params.get("parameterization", "eps")],
        "set_alpha_to_one": False,
        "steps_offset": 0 if zero_snr else 1,
        "timestep_spacing": "trailing" if zero_snr else "leading",
    }
    if name == "pndm":
        return {**config, "skip_prk_steps": True}
    return {**config, "clip_sample": False, "thresholding": False, "rescale_betas_zero_snr": zero_snr}


def _betas_of(params: Mapping[str, Any]) -> dict[str, Any]:
    start, end = float(params.get("linear_start", 1e-4)), float(params.get("linear_end", 2e-2))
    steps, schedule, given = (
        int(params.get("timesteps", 1000)),
        params.get("beta_schedule", "linear"),
        params.get("given_betas"),
    )
    offset = float(params.get("cosine_s", COSINE_S))
    if given is not None or schedule not in _BETAS or (schedule == "cosine" and offset != COSINE_S):
        if given is None:
            given = make_beta_schedule(schedule, steps, start, end, offset)
        betas = [float(beta) for beta in given]
        return {
            "num_train_timesteps": len(betas),
            "beta_schedule": "linear",
            "beta_start": start,
            "beta_end": end,
            "trained_betas": betas,
        }
    return {
        "num_train_timesteps": steps,
        "beta_schedule": _BETAS[schedule],
        "beta_start": start,
        "beta_end": end,
        "trained_betas": None,
    }


def check_scheduler(params: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """InterchangeError where a folder's scheduler_config.json is of another noise schedule or prediction than the YAML's."""
    wanted = scheduler_config(params)
    for key in _COMPARED:
        ours, theirs = wanted.get(key), found.get(key, _DEFAULTS.get(key))
        close = abs(ours - theirs) < 1e-9 if isinstance(ours, float) and isinstance(theirs, float) else ours == theirs
        if not close:
            shown = [f"{len(value)} numbers" if isinstance(value, list) else value for value in (theirs, ours)]
            raise InterchangeError(
                f"scheduler/scheduler_config.json: {key} is {shown[0]} there and {shown[1]} in the YAML"
            )
