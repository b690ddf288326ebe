"""Noise schedules by name."""

import numpy as np
import pytest

from ldm.config.beta_schedule import BETA_SCHEDULES, make_beta_schedule


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_every_schedule_has_one_variance_per_step_in_the_unit_interval_and_rises(name):
    betas = make_beta_schedule(name, 50)
    assert betas.shape == (50,) and betas.dtype == np.float64 and betas.min() >= 0 and betas.max() < 1
    assert (np.diff(betas) >= 0).all()


def test_linear_is_linear_in_the_square_root_and_sqrt_linear_in_beta():
    assert np.allclose(np.diff(np.sqrt(make_beta_schedule("linear", 9)), 2), 0)
    assert np.allclose(np.diff(make_beta_schedule("sqrt_linear", 9), 2), 0)
    assert np.allclose(make_beta_schedule("sqrt", 9) ** 2, make_beta_schedule("sqrt_linear", 9))


def test_an_unknown_name_and_no_steps_are_refused():
    with pytest.raises(ValueError, match="beta_schedule 'exp': choose one of"):
        make_beta_schedule("exp", 3)
    with pytest.raises(ValueError, match="timesteps 0"):
        make_beta_schedule("linear", 0)
