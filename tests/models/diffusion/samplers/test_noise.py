"""Noise of a batch and of single samples."""

import pytest
import torch

from ldm.models.diffusion.samplers.noise import PUBLISHED_NOISE, NoisePerSample
from ldm.models.diffusion.samplers.registry import SAMPLERS
from tests.models.diffusion.samplers.toy import COND, SHAPE, X0, ToyModel, sample


def test_published_noise_is_torchs_own():
    x = torch.zeros(2, *SHAPE, dtype=torch.float64)
    torch.manual_seed(0)
    values = [PUBLISHED_NOISE.normal(x.shape, "cpu", x.dtype), PUBLISHED_NOISE.normal_like(x)]
    torch.manual_seed(0)
    assert all(torch.equal(value, torch.randn_like(x)) for value in values)


def test_a_samples_noise_depends_on_its_seed_alone():
    single = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(9))
    for seeds in ([9], [3, 9, 5], [9, 9]):
        noise = NoisePerSample(seeds).normal((len(seeds), *SHAPE), "cpu", torch.float64)
        assert noise.dtype == torch.float64
        assert all(torch.equal(noise[i].float(), single) == (seed == 9) for i, seed in enumerate(seeds))
    assert torch.equal(NoisePerSample([9]).normal_like(torch.zeros(1, *SHAPE))[0], single)


@pytest.mark.parametrize("source", [PUBLISHED_NOISE, NoisePerSample([1, 2])])
def test_dropout_zeroes_with_its_probability_and_keeps_the_mean(source):
    torch.manual_seed(0)
    out = source.dropout(torch.ones(2, 4, 64, 64), 0.2)
    assert set(out.unique().tolist()) == {0.0, 1.25} and abs(float(out.mean()) - 1.0) < 0.02


def test_seeds_for_another_number_of_samples_are_refused():
    for call in (lambda s: s.normal((3, 4), "cpu"), lambda s: s.dropout(torch.ones(3, 4), 0.5)):
        with pytest.raises(ValueError, match="noise for a batch of 3: there are seeds for 2 samples"):
            call(NoisePerSample([1, 2]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_random_number_of_a_run_comes_from_its_source(name):
    """The initial noise, masks and dropped noise included: torch's own generator is not used."""
    more = {"temperature": 0.9, "noise_dropout": 0.2} if SAMPLERS[name].adds_noise else {}
    more |= {"mask": torch.ones(1, 1, 6, 6).tril(), "x0": X0[:1].expand(2, -1, -1, -1), "x_T": None}
    more |= {"conditioning": COND[:1].expand(2, -1, -1, -1), "noise_source": NoisePerSample([7, 7])}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    z = sample(name, ToyModel(), 3, **more)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(*z.samples) and torch.isfinite(z.samples).all()
