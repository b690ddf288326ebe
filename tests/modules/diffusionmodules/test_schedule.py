"""Laws of the noise schedules and of the samplers' grids, and the published figures."""

import numpy as np
import pytest

from ldm.modules.diffusionmodules.schedule import (
    Schedule,
    make_beta_schedule,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    rescale_zero_terminal_snr,
)
from tests.reference import GOLDEN, TOLERANCE, rel_error

FIGURES = np.load(GOLDEN / "numerics" / "schedules.npz")
BETAS = {
    "linear": {"schedule": "linear", "n_timestep": 1000, "linear_start": 0.0015, "linear_end": 0.0195},
    "sd": {"schedule": "linear", "n_timestep": 1000, "linear_start": 0.00085, "linear_end": 0.0120},
    "cosine": {"schedule": "cosine", "n_timestep": 100},
    "sqrt_linear": {"schedule": "sqrt_linear", "n_timestep": 50, "linear_start": 1e-4, "linear_end": 2e-2},
    "sqrt": {"schedule": "sqrt", "n_timestep": 50, "linear_start": 1e-4, "linear_end": 2e-2},
}


@pytest.mark.parametrize("name", BETAS)
def test_betas_meet_the_published_figures(name):
    assert rel_error(make_beta_schedule(**BETAS[name]), FIGURES[f"betas_{name}"]) < TOLERANCE


@pytest.mark.parametrize("key", [key for key in FIGURES.files if key.startswith("ddim_timesteps_")])
def test_ddim_tables_meet_the_published_figures(key):
    method, steps = key.removeprefix("ddim_timesteps_").split("_")
    grid = make_ddim_timesteps(method, int(steps), 1000, verbose=False)
    assert np.array_equal(grid, FIGURES[key])
    alphas_cumprod = Schedule(FIGURES["betas_sd"]).alphas_cumprod
    for eta in (0, 1):
        for part, table in (
            make_ddim_sampling_parameters(alphas_cumprod, grid, float(eta), verbose=False)._asdict().items()
        ):
            assert rel_error(table, FIGURES[f"ddim_{method}_{steps}_eta{eta}_{part}"]) < TOLERANCE


@pytest.mark.parametrize("name", ["uniform", "trailing"])
def test_every_grid_has_exactly_the_steps_asked_for(name):
    for T in (1, 7, 30, 1000):
        for steps in range(1, T + 1):
            grid = make_ddim_timesteps(name, steps, T, verbose=False)
            assert name == "uniform" or grid[-1] == T - 1
            assert len(grid) == steps and (np.diff(grid) > 0).all() and grid[0] >= 0 and grid[-1] < T


def test_uniform_is_the_published_grid_where_steps_divide_the_chain():
    for steps in (s for s in range(1, 1000) if 1000 % s == 0):
        assert np.array_equal(
            make_ddim_timesteps("uniform", steps, 1000, verbose=False), np.arange(0, 1000, 1000 // steps) + 1
        )


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_a_grid_that_does_not_exist_is_refused(steps):
    with pytest.raises(ValueError, match="choose 1 to 1000"):
        make_ddim_timesteps("uniform", steps, 1000)


def test_unknown_names_list_the_choices():
    with pytest.raises(ValueError, match="linear, cosine, sqrt_linear, sqrt"):
        make_beta_schedule("exponential", 10)
    with pytest.raises(ValueError, match="uniform, quad"):
        make_ddim_timesteps("cubic", 10, 1000)


def test_posterior_variance_mixes_towards_beta():
    betas = make_beta_schedule("linear", 50)
    assert np.allclose(Schedule(betas, v_posterior=1.0).posterior_variance, betas)
    assert Schedule(betas).posterior_variance[0] == 0.0


@pytest.mark.parametrize("betas", [[[0.1]], [0.1, 1.0], [-0.1, 0.2]])
def test_betas_outside_their_range_are_refused(betas):
    with pytest.raises(ValueError, match=r"betas must be \(T,\) with values in \[0, 1\)"):
        Schedule.from_betas(betas)


def test_trailing_steps_count_back_from_the_last_timestep():
    assert make_ddim_timesteps("trailing", 5, 1000, verbose=False).tolist() == [199, 399, 599, 799, 999]
    assert make_ddim_timesteps("trailing", 3, 1000, verbose=False).tolist() == [332, 666, 999]


def test_zero_terminal_snr_keeps_the_first_timestep_and_leaves_no_signal_at_the_last():
    betas = make_beta_schedule("linear", 1000, linear_start=0.00085, linear_end=0.0120)
    schedule = Schedule.from_betas(betas, zero_terminal_snr=True)
    before, after = np.sqrt(Schedule(betas).alphas_cumprod), np.sqrt(schedule.alphas_cumprod)
    assert after[-1] == 0.0 and schedule.betas[-1] == 1.0 and abs(after[0] - before[0]) < 1e-12
    assert np.allclose(
        (after - after[-1]) / (after[0] - after[-1]), (before - before[-1]) / (before[0] - before[-1])
    )  # shifted and scaled
    tables = schedule.tables()
    assert all(np.isfinite(table[:-1]).all() for table in tables.values())
    assert np.isfinite(tables["posterior_mean_coef1"]).all() and tables["posterior_mean_coef2"][-1] == 0.0


def test_zero_terminal_snr_of_a_single_timestep_is_refused():
    with pytest.raises(ValueError, match="at least 2 timesteps"):
        rescale_zero_terminal_snr(np.array([0.1]))
