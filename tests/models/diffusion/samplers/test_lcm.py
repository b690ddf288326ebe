"""LCM: diffusers' trajectories, and exact data from an exact consistency model."""

import pytest
import torch
from diffusers import LCMScheduler

from ldm.models.diffusion.samplers.lcm import LCMSampler
from ldm.models.diffusion.samplers.registry import make_sampler
from tests.models.diffusion.samplers.against_diffusers import scheduler, trajectory
from tests.models.diffusion.samplers.toy import X_T, GaussianConsistencyModel, ToyModel, on_the_flow, sample
from tests.reference import TOLERANCE, randn, rel_error


@pytest.mark.parametrize("count", [1, 3, 4, 8])
@pytest.mark.parametrize("original_steps", [50, 25])
def test_trajectories_are_those_of_diffusers(count, original_steps):
    model = ToyModel()
    x, inter = sample("lcm", model, count, options={"original_steps": original_steps}, log_every_t=1)
    sched = scheduler(LCMScheduler, model)
    sched.set_timesteps(count, original_inference_steps=original_steps)
    assert [int(t[0]) for _, t in model.calls] == sched.timesteps.tolist()
    for ours, theirs in zip(inter["x_inter"][1:], trajectory(sched, model, X_T), strict=True):
        assert rel_error(ours, theirs) < TOLERANCE
    assert torch.equal(inter["pred_x0"][-1], x)


@pytest.mark.parametrize(
    "options, data, scaling", [({}, 0.5, 10), ({"sigma_data": 0.7, "timestep_scaling": 2.0}, 0.7, 2)]
)
def test_the_boundary_condition_is_the_released_one(options, data, scaling):
    steps = make_sampler("lcm", ToyModel(timesteps=4), **options).checked_steps(4)
    for t, c_skip, c_out in zip(range(4), steps.coefs["c_skip"], steps.coefs["c_out"]):
        assert c_skip == pytest.approx(data**2 / ((scaling * t) ** 2 + data**2))
        assert c_out == pytest.approx(scaling * t / ((scaling * t) ** 2 + data**2) ** 0.5)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_an_exact_consistency_model_gives_the_datas_mean_and_deviation(count):
    model = GaussianConsistencyModel()
    x_T = on_the_flow(model, float(model.alphas_cumprod[-1]), randn(9, 16, 4, 16, 16))
    torch.manual_seed(0)
    x = make_sampler("lcm", model).sample(count, 16, (4, 16, 16), x_T=x_T, verbose=False).samples
    assert abs(float(x.mean()) - 0.7) < 0.01 and abs(float(x.std()) - 0.3) < 0.01


def test_timesteps_are_those_of_the_distillation_or_trailing_ones():
    assert LCMSampler(ToyModel(), original_steps=1).original_steps == 1
    sampler = LCMSampler(ToyModel())
    assert sampler.checked_steps(4).t.tolist() == [259, 499, 759, 999]  # of the 50 distilled 19, 39, ... 999
    assert sampler.checked_steps(4, spacing="trailing").t.tolist() == [249, 499, 749, 999]
    assert len(sampler.checked_steps(60).t) == 60 and LCMSampler(ToyModel(timesteps=20)).original_steps == 20


@pytest.mark.parametrize("original_steps", [0, 1001])
def test_a_distillation_with_more_timesteps_than_the_model_is_refused(original_steps):
    with pytest.raises(ValueError, match=f"original_steps {original_steps}: choose 1 to 1000"):
        LCMSampler(ToyModel(), original_steps=original_steps)
