"""Laws of eps, x0 and v."""

import pytest
import torch

from ldm.modules.diffusionmodules.parameterization import PARAMETERIZATIONS, get_parameterization
from tests.reference import randn, rel_error


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@pytest.mark.parametrize("alpha_bar", [0.999, 0.5, 0.01])
def test_the_target_gives_back_the_noise_and_the_clean_signal(name, alpha_bar):
    alpha, sigma = torch.tensor(alpha_bar).sqrt(), torch.tensor(1 - alpha_bar).sqrt()
    x0, noise = randn(0, 2, 3, 4, 4), randn(1, 2, 3, 4, 4)
    x, p = alpha * x0 + sigma * noise, get_parameterization(name)
    out = p.target(x0, noise, alpha, sigma)
    assert rel_error(p.to_x0(x, out, alpha, sigma), x0) < 1e-4
    assert rel_error(p.to_eps(x, out, alpha, sigma), noise) < 1e-4


def test_an_unknown_parameterization_lists_the_choices():
    with pytest.raises(ValueError, match="'score': choose one of eps, x0, v"):
        get_parameterization("score")
