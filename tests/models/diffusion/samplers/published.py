"""Samples of the published code with the toy model (tests/golden/numerics)."""

import numpy as np
import torch

from tests.reference import GOLDEN, TOLERANCE, randn, rel_error

SHAPE = (4, 6, 6)
NUMBERS = np.load(GOLDEN / "numerics" / "samplers.npz")
X_T, X0, MASK = randn(202, 2, *SHAPE), randn(203, 2, *SHAPE), (randn(204, 2, 1, 6, 6) > 0).float()
COND, UNCOND = randn(200, 2, 4, 1, 1), randn(201, 2, 4, 1, 1)
GUIDED = {"unconditional_guidance_scale": 7.5, "unconditional_conditioning": UNCOND}
CASES = {
    "ddim_20": {"x_T": X_T},
    "ddim_20_cfg": {"x_T": X_T, **GUIDED},
    "ddim_20_eta1": {"eta": 1.0},
    "ddim_20_eta05_temp08": {"eta": 0.5, "temperature": 0.8, "x_T": X_T, **GUIDED},
    "ddim_20_mask": {"x_T": X_T, "mask": MASK, "x0": X0, **GUIDED},
    "plms_20": {"x_T": X_T},
    "plms_20_cfg": {"x_T": X_T, **GUIDED},
    "plms_50_seeded": GUIDED,
    "dpm_10_cfg": {"x_T": X_T, **GUIDED},
    "dpm_20_cfg": {"x_T": X_T, **GUIDED},
    "dpm_50_cfg": GUIDED,
}


def assert_published(name, sampler):
    torch.manual_seed(1234)
    x, intermediates = sampler.sample(int(name.split("_")[1]), 2, SHAPE, COND, verbose=False, **CASES[name])
    assert rel_error(x, NUMBERS[name]) < TOLERANCE
    if f"{name}_pred_x0" in NUMBERS.files:
        assert rel_error(intermediates["pred_x0"][-1], NUMBERS[f"{name}_pred_x0"]) < TOLERANCE
