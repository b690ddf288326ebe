"""The noise schedule as diffusers' scheduler_config.json; the published `linear` is its `scaled_linear`."""

from collections.abc import Mapping
from typing import Any

from ldm.checkpoint.diffusers.rules import ConversionError
from ldm.config.beta_schedule import make_beta_schedule

SCHEDULERS = {"ddim": "DDIMScheduler", "pndm": "PNDMScheduler"}
_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
_COSINE_S = 8e-3  # the only offset that squaredcos_cap_v2 supports
_DEFAULTS = {  # diffusers' own, for the keys that must agree
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 2e-2,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}


def scheduler_config(params: Mapping[str, Any], name: str = "ddim") -> dict[str, Any]:
    """scheduler_config.json of a diffusion model with the `params` of its YAML.

    name: ddim, or pndm (PLMS). Steps are the published ones: 1, 1 + T/S, ..., and the last goes to alphas_cumprod[0],
    not to 1; with a zero terminal SNR they end at T - 1.
    """
    if name not in SCHEDULERS:
        raise ConversionError(f"--scheduler {name}: choose one of {', '.join(SCHEDULERS)}")
    zero_snr = bool(params.get("zero_terminal_snr"))
    if zero_snr and name != "ddim":
        raise ConversionError(f"--scheduler {name}: zero_terminal_snr requires ddim")
    config = {
        "_class_name": SCHEDULERS[name],
        **_beta_config(params),
        "prediction_type": _PREDICTIONS[params.get("parameterization", "eps")],
        "set_alpha_to_one": False,
        "steps_offset": 0 if zero_snr else 1,
        "timestep_spacing": "trailing" if zero_snr else "leading",
    }
    if name == "pndm":
        return {**config, "skip_prk_steps": True}
    return {**config, "clip_sample": False, "thresholding": False, "rescale_betas_zero_snr": zero_snr}


def _beta_config(params: Mapping[str, Any]) -> dict[str, Any]:
    start, end = float(params.get("linear_start", 1e-4)), float(params.get("linear_end", 2e-2))
    steps, schedule = int(params.get("timesteps", 1000)), params.get("beta_schedule", "linear")
    offset, betas = float(params.get("cosine_s", _COSINE_S)), params.get("given_betas")
    if betas is None and (schedule not in _BETAS or (schedule == "cosine" and offset != _COSINE_S)):
        betas = make_beta_schedule(schedule, steps, start, end, offset)
    return {
        "num_train_timesteps": steps if betas is None else len(betas),
        "beta_schedule": _BETAS[schedule] if betas is None else "linear",
        "beta_start": start,
        "beta_end": end,
        "trained_betas": None if betas is None else [float(beta) for beta in betas],
    }


def check_scheduler(params: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise ConversionError if a scheduler_config.json has another noise schedule or prediction than the YAML."""
    wanted = scheduler_config(params)
    for key, default in _DEFAULTS.items():
        ours, theirs = wanted[key], found.get(key, default)
        close = abs(ours - theirs) < 1e-9 if isinstance(ours, float) and isinstance(theirs, float) else ours == theirs
        if not close:
            shown = [f"{len(value)} numbers" if isinstance(value, list) else value for value in (theirs, ours)]
            raise ConversionError(f"scheduler/scheduler_config.json: {key} is {shown[0]}, but {shown[1]} in the YAML")
