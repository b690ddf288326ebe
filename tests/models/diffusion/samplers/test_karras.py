"""Euler, Heun and DPM++ 2M: diffusers' trajectories, orders on exact data, and the distribution of noisy samples."""

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from ldm.models.diffusion.samplers.karras import DPMPP2MSDESampler
from ldm.models.diffusion.samplers.registry import make_sampler
from ldm.models.diffusion.samplers.spacing import NoiseLevels
from tests.models.diffusion.samplers.against_diffusers import assert_follows
from tests.models.diffusion.samplers.toy import GaussianModel, ToyModel, assert_order, error_between_fixed_times, sample


@pytest.mark.parametrize("spacing", ["uniform", "karras", "trailing"])
@pytest.mark.parametrize(
    "name, scheduler, config",
    [
        ("euler", EulerDiscreteScheduler, {"divided": True}),
        ("euler_ancestral", EulerAncestralDiscreteScheduler, {"divided": True}),
        ("heun", HeunDiscreteScheduler, {"divided": True, "calls": 2}),
        ("dpmpp_2m", DPMSolverMultistepScheduler, {"solver_order": 2, "final_sigmas_type": "zero"}),
        ("dpmpp_2m_sde", DPMSolverMultistepScheduler, {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
        (
            "dpmpp_2m_sde",
            DPMSolverMultistepScheduler,
            {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "options": {"solver": "heun"}},
        ),
    ],
)
def test_trajectories_are_those_of_diffusers(name, scheduler, config, spacing):
    for count in (1, 2, 3, 8):
        assert_follows(name, scheduler, count, spacing, **config)


@pytest.mark.parametrize(
    "name, order, spacing",
    [
        ("euler", 1, "logsnr"),
        ("euler", 1, "karras"),
        ("euler_ancestral", 1, "karras"),
        ("heun", 2, "logsnr"),
        ("heun", 2, "karras"),
        ("dpmpp_2m", 2, "karras"),
        ("dpmpp_2m_sde", 2, "logsnr"),
    ],
)
def test_deterministic_runs_converge_at_their_order(name, order, spacing):
    assert_order(name, order, spacing)


@pytest.mark.parametrize("name, fall", [("heun", 3.2), ("dpmpp_2m", 3.0)])
def test_steps_uniform_in_time_converge_when_there_are_many(name, fall):
    coarse, fine = (error_between_fixed_times(name, steps) for steps in (250, 500))
    assert coarse > fall * fine


@pytest.mark.parametrize(
    "name, steps, spacing, eta, options",
    [
        ("euler_ancestral", 300, "logsnr", 1.0, {}),
        ("dpmpp_2m_sde", 50, "karras", 1.0, {}),
        ("dpmpp_2m_sde", 60, "logsnr", 1.0, {}),
        ("dpmpp_2m_sde", 50, "karras", 0.6, {"solver": "heun"}),
    ],
)
def test_noisy_samples_have_the_datas_mean_and_deviation(name, steps, spacing, eta, options):
    torch.manual_seed(0)
    sampler = make_sampler(name, GaussianModel(), **options)
    x = sampler.sample(steps, 16, (4, 16, 16), eta=eta, verbose=False, ddim_discretize=spacing).samples
    assert abs(float(x.mean()) - 0.7) < 0.01 and abs(float(x.std()) - 0.3) < 0.01


@pytest.mark.parametrize("noisy, plain", [("euler_ancestral", "euler"), ("dpmpp_2m_sde", "dpmpp_2m")])
def test_a_noisy_sampler_at_eta_zero_is_its_deterministic_one(noisy, plain):
    for spacing in ("uniform", "karras"):
        x, expected = (sample(name, ToyModel(), eta=0.0, ddim_discretize=spacing).samples for name in (noisy, plain))
        assert torch.allclose(x, expected, atol=1e-6)


def test_an_eta_beyond_one_never_adds_more_noise_than_the_next_level_has():
    x = sample("euler_ancestral", ToyModel(), eta=100.0).samples
    assert torch.isfinite(x).all()
    start, end = NoiseLevels(np.array([500.0]), np.array([0.3])), NoiseLevels(np.array([300.0]), np.array([0.6]))
    up, coefs = make_sampler("euler_ancestral", ToyModel()).tables(start, end, 100.0)
    assert up == pytest.approx(end.sigma) and coefs["down"] == 0.0


def test_heun_calls_the_network_twice_a_step_but_once_in_the_last():
    model = ToyModel()
    sample("heun", model, 5)
    times = [float(t[0]) for _, t in model.calls]
    assert len(times) == 9 and times[1::2] == times[2::2]


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="solver 'euler': choose one of midpoint, heun"):
        DPMPP2MSDESampler(ToyModel(), solver="euler")
