"""UniPC: diffusers' trajectories, and its orders on exact data."""

import pytest
from diffusers import UniPCMultistepScheduler

from ldm.models.diffusion.samplers.unipc import UniPCSampler
from tests.models.diffusion.samplers.against_diffusers import assert_follows
from tests.models.diffusion.samplers.toy import ToyModel, assert_order


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("spacing", ["uniform", "logsnr", "karras", "trailing"])
def test_trajectories_are_those_of_diffusers_to_the_last_steps_of_lower_order(order, variant, spacing):
    options, config = {"order": order, "variant": variant}, {"solver_order": order, "solver_type": variant}
    for count in (1, 2, 3, 4, 9):
        assert_follows(
            "unipc", UniPCMultistepScheduler, count, spacing, options, final_sigmas_type="sigma_min", **config
        )


@pytest.mark.parametrize(
    "order, spacing, options",
    [(2, "logsnr", {"order": 1}), (3, "logsnr", {"variant": "bh1"}), (3, "karras", {})],
)
def test_the_corrector_gains_one_order(order, spacing, options):
    assert_order("unipc", order, spacing, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"order": 0}, "order 0: choose 1 to 3"),
        ({"order": 4}, "order 4: choose 1 to 3"),
        ({"variant": "bh3"}, "'bh3': choose one of bh1, bh2"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UniPCSampler(ToyModel(), **options)
