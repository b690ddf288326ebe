"""The noise schedule of a folder is the model's."""

import pytest
import torch

from ldm.checkpoint.diffusers.scheduler import scheduler_config
from ldm.modules.diffusionmodules.schedule import Schedule, make_beta_schedule


@pytest.mark.parametrize(
    "params",
    [
        *({"beta_schedule": schedule, "timesteps": 50} for schedule in ("linear", "sqrt_linear", "sqrt", "cosine")),
        {"beta_schedule": "cosine", "cosine_s": 0.1, "timesteps": 50},
        {"given_betas": [0.1, 0.2, 0.3]},
        {"zero_terminal_snr": True, "parameterization": "v"},
    ],
)
def test_every_noise_schedule_has_the_same_tables_in_diffusers(params):
    DDIMScheduler = pytest.importorskip("diffusers").DDIMScheduler

    zero_snr = bool(params.get("zero_terminal_snr"))
    names = ("linear_start", "linear_end", "cosine_s")
    betas = params.get("given_betas") or make_beta_schedule(
        params.get("beta_schedule", "linear"),
        params.get("timesteps", 1000),
        **{name: params[name] for name in names if name in params},
    )
    ours = Schedule.from_betas(betas, zero_terminal_snr=zero_snr).alphas_cumprod
    theirs = DDIMScheduler.from_config(scheduler_config(params)).alphas_cumprod
    assert torch.allclose(theirs.double(), torch.from_numpy(ours), atol=1e-6)
