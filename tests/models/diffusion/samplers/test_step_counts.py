"""Every number of steps works with every sampler, or is refused before a model is loaded. All of them in full: python -m tests.full."""

import dataclasses

import numpy as np
import pytest

from ldm.inference.settings import TextToImageRequest, check_steps, model_info
from ldm.models.diffusion.samplers.registry import SAMPLERS, make_sampler
from tests.full.step_counts import Clock, check, check_refused
from tests.tiny import text_model_config

SLOW_TABLES = {"unipc": 97, "dpm_solver_2s": 11, "dpm_solver_3s": 37}  # of every so many counts the whole table is made
DOZEN = (1, 2, 3, 4, 5, 7, 10, 20, 25, 50, 99, 1000)
INFO = model_info(text_model_config(timesteps=1000))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_count_has_its_grid_and_is_accepted_before_loading(name):
    sampler = make_sampler(name, Clock())
    for steps in range(1, 1001):
        if steps % SLOW_TABLES.get(name, 1) == 0 or steps <= 12 or steps == 1000:
            grid = sampler.checked_steps(steps)
            assert len(grid.t) == len(grid.alphas_prev) == steps, steps
            assert (np.diff(grid.t) > 0).all() and grid.t[0] >= 0 and grid.t[-1] <= 999, steps
            assert all(np.isfinite(table).all() for table in (grid.t, grid.alphas, grid.alphas_prev, grid.sigmas)), (
                steps
            )


def test_a_scripts_settings_accept_the_same_counts():
    settings = TextToImageRequest(height=16, width=16)
    for steps in range(-1, 1003):
        try:
            check_steps("--ddim_steps", steps, INFO)
        except ValueError as error:
            assert not 1 <= steps <= 1000 and "choose 1 to 1000" in str(error)
        else:
            assert 1 <= steps <= 1000
    for name in SAMPLERS:
        assert dataclasses.replace(settings, sampler=name, steps=1000).checked(INFO).steps == 1000
        with pytest.raises(ValueError, match="--ddim_steps 1001: choose 1 to 1000"):
            dataclasses.replace(settings, sampler=name, steps=1001).checked(INFO)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_dozen_of_them_run_exactly_and_the_others_are_refused(name):
    assert list(check(name, DOZEN)) == list(DOZEN)
    assert len(list(check_refused(name))) == 5
