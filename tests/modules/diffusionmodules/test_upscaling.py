"""Laws of the upscaler's noise augmentation."""

import pytest
import torch

from ldm.modules.diffusionmodules.upscaling import ImageConcatWithNoiseAugmentation
from tests.reference import randn

TABLES = (
    "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
    "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod"
)


@pytest.fixture(scope="module")
def module():
    return ImageConcatWithNoiseAugmentation({"linear_start": 0.0001, "linear_end": 0.02}, max_noise_level=350)


def test_tables_have_the_names_of_published_checkpoints(module):
    assert list(module.state_dict()) == TABLES.split()
    assert all(table.shape == (1000,) for table in module.state_dict().values())


def test_noise_of_a_level_is_that_of_the_forward_process(module):
    x, level = randn(0, 2, 3, 4, 4), torch.tensor([10, 300])
    torch.manual_seed(0)
    noised, same = module(x, level)
    torch.manual_seed(0)
    noise = torch.randn_like(x)
    alpha = module.alphas_cumprod[level][:, None, None, None]
    assert same is level and torch.allclose(noised, alpha.sqrt() * x + (1 - alpha).sqrt() * noise, atol=1e-6)
    torch.manual_seed(0)
    assert torch.equal(module(x.to(memory_format=torch.channels_last), level)[0], noised)
    assert module.decode(x) is x


def test_levels_are_random_below_the_maximum_and_cover_it(module):
    torch.manual_seed(0)
    _, level = module(torch.zeros(5000, 1, 1, 1))
    assert level.dtype == torch.int64 and level.min() == 0 and level.max() == 349


def test_a_level_beyond_the_schedule_and_an_unknown_option_are_refused():
    for level in (0, 1001):
        with pytest.raises(ValueError, match=f"max_noise_level {level}: choose 1 to 1000"):
            ImageConcatWithNoiseAugmentation(max_noise_level=level)
    with pytest.raises(ValueError, match="unknown linear_stop; choose from beta_schedule"):
        ImageConcatWithNoiseAugmentation({"linear_stop": 1})
