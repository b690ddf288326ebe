"""PLMS: the published numbers, and its order compared with DDIM's."""

import pytest
import torch

from ldm.models.diffusion.plms import PLMSSampler
from tests.models.diffusion.samplers.published import assert_published
from tests.models.diffusion.samplers.toy import X_T, GaussianModel, ToyModel, error_between_fixed_times, sample
from tests.reference import rel_error


@pytest.mark.parametrize("name", ["plms_20", "plms_20_cfg", "plms_50_seeded"])
def test_samples_are_the_published_ones(name):
    assert_published(name, PLMSSampler(ToyModel()))


def test_it_is_more_exact_than_ddim():
    assert error_between_fixed_times("plms", 50) < 0.4 * error_between_fixed_times("ddim", 50)


def test_the_first_step_is_a_heun_step_of_two_calls_and_two_noises():
    model = ToyModel()
    torch.manual_seed(0)
    sample("plms", model, 2)
    assert [int(t[0]) for _, t in model.calls] == [501, 1, 1]
    sample("plms", model, 1)
    assert [int(t[0]) for _, t in model.calls[3:]] == [1, 1]  # a single step looks at itself again
    torch.manual_seed(0)
    sample("plms", ToyModel(), 2)
    used = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(3):
        torch.randn_like(X_T)
    assert torch.equal(torch.get_rng_state(), used)


def test_the_first_step_from_pure_noise_is_eulers():
    model = GaussianModel("v", zero_terminal_snr=True)
    kwargs = {"conditioning": None, "ddim_discretize": "trailing", "log_every_t": 1}
    plms, ddim = (sample(name, model, 6, **kwargs).intermediates["x_inter"] for name in ("plms", "ddim"))
    assert rel_error(plms[1], ddim[1]) < 1e-6
