"""Every number of steps works with every sampler, or is refused. All of them in full: python -m tests.full."""

import dataclasses

import numpy as np
import pytest
import torch

from ldm.config.model_info import model_info
from ldm.inference.requests import TextToImageRequest
from ldm.inference.settings import check_steps
from ldm.models.diffusion.samplers.registry import SAMPLERS, make_sampler
from tests.full.step_counts import MORE_CALLS, Clock, check, check_refused
from tests.models.diffusion.samplers.toy import ToyModel, sample
from tests.tiny import text_model_config

COUNTS = (*range(1, 13), 37, 599, 1000)
DOZEN = (1, 2, 3, 4, 5, 7, 10, 20, 25, 50, 99)
INFO = model_info(text_model_config(timesteps=1000))


@pytest.mark.parametrize("name", SAMPLERS)
def test_step_counts_of_a_long_schedule_have_their_tables(name):
    sampler = make_sampler(name, Clock())
    for count in COUNTS:
        steps = sampler.checked_steps(count)
        assert len(steps.t) == len(steps.alphas_prev) == count, count
        assert (np.diff(steps.t) > 0).all() and steps.t[0] >= 0 and steps.t[-1] <= 999, count
        assert all(np.isfinite(table).all() for table in (*steps[:4], *steps.coefs.values())), count


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_count_of_a_short_schedule_calls_the_network_at_falling_timesteps(name):
    for spacing in (spacing for spacing in SAMPLERS[name].spacings if spacing != "quad"):  # quad repeats small ones
        for count in range(1, 13):
            model, seen = ToyModel(timesteps=12), []
            x = sample(name, model, count, callback=seen.append, ddim_discretize=spacing).samples
            times = [float(t[0]) for _, t in model.calls]
            times = sorted(set(times), reverse=True) if name in MORE_CALLS else times
            assert torch.isfinite(x).all() and seen == list(range(count)), (spacing, count)
            assert len(times) == count and (np.diff(times) < 0).all(), (spacing, count)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_dozen_step_counts_run_exactly_and_impossible_ones_are_refused(name):
    assert list(check(name, DOZEN)) == list(DOZEN)
    assert len(list(check_refused(name))) == 5


def test_a_request_accepts_the_same_counts():
    for steps in range(-1, 1003):
        try:
            check_steps("--ddim_steps", steps, INFO)
        except ValueError as error:
            assert not 1 <= steps <= 1000 and "choose 1 to 1000" in str(error)
        else:
            assert 1 <= steps <= 1000
    request = TextToImageRequest(height=16, width=16)
    for name in SAMPLERS:
        assert dataclasses.replace(request, sampler=name, steps=1000).checked(INFO).steps == 1000
        with pytest.raises(ValueError, match="--ddim_steps 1001: choose 1 to 1000"):
            dataclasses.replace(request, sampler=name, steps=1001).checked(INFO)
