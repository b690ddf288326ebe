"""DDPM's ancestral sampler: diffusers' trajectories, its variance, and the distribution of its samples."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from ldm.models.diffusion.samplers.registry import make_sampler
from tests.models.diffusion.samplers.against_diffusers import scheduler, trajectory
from tests.models.diffusion.samplers.toy import X_T, GaussianModel, ToyModel, sample
from tests.reference import TOLERANCE, rel_error


@pytest.mark.parametrize("spacing, count", [("uniform", 1), ("uniform", 7), ("trailing", 7), ("uniform", 30)])
def test_trajectories_are_those_of_diffusers(spacing, count):
    model = ToyModel(timesteps=30)
    _, inter = sample("ancestral", model, count, ddim_discretize=spacing, log_every_t=1)
    sched = scheduler(DDPMScheduler, model, clip_sample=False)
    sched.set_timesteps(timesteps=[int(t[0]) for _, t in model.calls])
    for ours, theirs in zip(inter["x_inter"][1:], trajectory(sched, model, X_T), strict=True):
        assert rel_error(ours, theirs) < TOLERANCE


def test_the_reverse_variance_is_the_models_and_the_true_posteriors_without_one():
    model = ToyModel()
    betas, posterior = model.betas.double().numpy(), model.posterior_variance.double().numpy()
    for v_posterior in (None, 0.0, 0.25, 1.0):
        if v_posterior is not None:
            model.v_posterior = v_posterior
        share = v_posterior or 0.0
        sigmas = make_sampler("ancestral", model).checked_steps(1000).sigmas
        np.testing.assert_allclose(sigmas[1:] ** 2, ((1 - share) * posterior + share * betas)[1:], rtol=1e-3)
        assert sigmas[0] == 0.0


def test_all_timesteps_use_the_models_own_betas():
    model = ToyModel()
    model.betas = model.betas.clone()
    model.betas[500] = 0.3  # unlike alphas_cumprod
    steps = make_sampler("ancestral", model).checked_steps(1000)
    assert steps.alphas[500] / steps.alphas[499] == pytest.approx(0.7)


@pytest.mark.parametrize("steps, spacing, tolerance", [(1000, "uniform", 0.01), (500, "trailing", 0.015)])
def test_samples_have_the_datas_mean_and_deviation(steps, spacing, tolerance):
    torch.manual_seed(0)  # of fewer steps, the posterior's variance is a little small
    sampler = make_sampler("ancestral", GaussianModel())
    x = sampler.sample(steps, 16, (4, 16, 16), verbose=False, ddim_discretize=spacing).samples
    assert abs(float(x.mean()) - 0.7) < tolerance and abs(float(x.std()) - 0.3) < tolerance
