"""Laws of the timesteps of training: their distribution, and that they belong to the batch of all ranks."""

import math

import pytest
import torch

from ldm.models.diffusion.timesteps import LogitNormalTimesteps, UniformTimesteps
from ldm.rng import CPU, BatchSamples, Purpose, integers, samples_set

T = 1000


def sampled(sampler, rows=20_000, **options):
    indices = range(rows)
    with samples_set(BatchSamples(5, 0, indices, rows, **options)):
        return sampler(rows, T, CPU)


@pytest.mark.parametrize("low_discrepancy", [False, True])
@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-1.0, 0.5), (0.7, 1.6)])
def test_logit_normal_timesteps_have_the_closed_form_distribution(mean, std, low_discrepancy):
    t = sampled(LogitNormalTimesteps(mean, std, low_discrepancy))
    for share in (0.05, 0.3, 0.5, 0.8, 0.97):
        quantile = (math.log(share / (1 - share)) - mean) / std
        wanted = 0.5 * (1 + math.erf(quantile / math.sqrt(2)))
        assert abs((t < share * T).double().mean() - wanted) < (1e-4 if low_discrepancy else 0.012)


def test_uniform_timesteps_are_those_without_a_section():
    with samples_set(BatchSamples(5, 0, range(9), 9)):
        wanted = integers(T, 9, Purpose.TIMESTEP, CPU)
    assert torch.equal(sampled(UniformTimesteps(), 9), wanted)


def test_low_discrepancy_timesteps_of_a_batch_have_equal_distances():
    t = sampled(UniformTimesteps(low_discrepancy=True), 8, start=24).sort().values
    assert t.diff().tolist() == [T // 8] * 7 and 0 <= t[0] < T // 8


def test_each_low_discrepancy_timestep_alone_is_uniform():
    sampler = UniformTimesteps(low_discrepancy=True)
    first = torch.stack([sampled(sampler, 4, start=4 * batch)[0] for batch in range(2000)])
    for share in (0.1, 0.5, 0.9):
        assert abs((first < share * T).double().mean() - share) < 0.04


@pytest.mark.parametrize("size", [7, 8])
def test_low_discrepancy_timesteps_do_not_depend_on_the_number_of_ranks(size):
    sampler, indices = UniformTimesteps(low_discrepancy=True), list(range(40, 40 + size))

    def timesteps(rank, ranks):
        own = BatchSamples(3, 2, indices[rank::ranks], size, start=16, places=range(rank, size, ranks))
        with samples_set(own):
            return dict(zip(own.indices, sampler(len(own.indices), T, CPU).tolist()))

    assert (
        timesteps(0, 1)
        == {**timesteps(0, 2), **timesteps(1, 2)}
        == {**timesteps(1, 3), **timesteps(0, 3), **timesteps(2, 3)}
    )


def test_without_samples_a_batch_is_spread_evenly_too():
    torch.manual_seed(0)
    assert UniformTimesteps(low_discrepancy=True)(10, T, CPU).sort().values.diff().tolist() == [100] * 9
