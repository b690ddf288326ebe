"""Laws of restoring the random generators, on the CPU and on the device of a model."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from ldm.rng import (
    CPU,
    BatchSamples,
    Purpose,
    current_samples,
    integers,
    normal_like,
    preserve_rng,
    preserve_torch_rng,
    samples_set,
    stratified,
    uniform,
)


def numbers():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("error", [False, True])
def test_all_generators_continue_as_if_unused(error):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    wanted = numbers()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    try:
        with preserve_rng():
            assert numbers() == wanted
            random.seed(7), np.random.seed(7), torch.manual_seed(7)
            if error:
                raise RuntimeError
    except RuntimeError:
        pass
    assert numbers() == wanted


@pytest.mark.parametrize("kept", [preserve_rng, preserve_torch_rng])
@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_the_generator_of_the_models_device_continues_as_if_unused(monkeypatch, kept, kind):
    states = {torch.device(kind, 0): torch.tensor([5])}
    module = getattr(torch, kind)
    monkeypatch.setattr(module, "get_rng_state", lambda device: states[device].clone())
    monkeypatch.setattr(module, "set_rng_state", lambda state, device: states.update({device: state}))
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    with kept(torch.device(kind, 0)):
        torch.rand(5)
        states[torch.device(kind, 0)] = torch.tensor([6])
    assert states[torch.device(kind, 0)].tolist() == [5] and torch.equal(torch.rand(2), wanted)


def samples(indices, seed=1, epoch=0):
    return BatchSamples(seed, epoch, indices)


def test_the_numbers_of_a_sample_do_not_depend_on_its_batch():
    whole = samples(range(8)).normal((8, 3, 5, 5), Purpose.NOISE, CPU)
    for split in ([[0, 1, 2], [3, 4, 5, 6, 7]], [[7, 0], [3, 5]], [[4]]):
        for indices in split:
            part = samples(indices).normal((len(indices), 3, 5, 5), Purpose.NOISE, CPU)
            assert torch.equal(part, whole[indices])


def test_seed_purpose_epoch_index_and_call_give_other_numbers():
    first = samples([3])
    numbers = [first.uniform(1, Purpose.NOISE, CPU), first.uniform(1, Purpose.NOISE, CPU)]
    numbers += [
        each.uniform(1, Purpose.NOISE, CPU) for each in (samples([4]), samples([3], seed=2), samples([3], epoch=1))
    ]
    numbers += [samples([3]).uniform(1, purpose, CPU) for purpose in Purpose if purpose != Purpose.NOISE]
    assert len({float(number) for number in numbers}) == len(numbers)


def test_a_thousand_steps_repeat_no_noise():
    rows = [samples(range(64), epoch=epoch).normal((64, 2), Purpose.NOISE, CPU) for epoch in range(1000)]
    assert len({tuple(row) for row in torch.cat(rows).tolist()}) == 64_000


def test_noise_is_standard_normal_and_independent():
    x = samples(range(200)).normal((200, 1001), Purpose.NOISE, CPU)
    assert x.isfinite().all() and abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert abs((x**4).mean() - 3) < 0.1 and x.abs().max() > 4
    assert (torch.corrcoef(x) - torch.eye(200)).abs().max() < 0.2  # five deviations
    assert torch.corrcoef(x.T[:200]).fill_diagonal_(0).abs().max() < 0.4


def test_integers_and_fractions_are_uniform():
    integers_ = samples(range(20_000)).integers(10, 20_000, Purpose.TIMESTEP, CPU)
    assert torch.bincount(integers_, minlength=10).sub(2000).abs().max() < 200 and len(integers_.unique()) == 10
    fractions = samples(range(20_000)).uniform(20_000, Purpose.TIMESTEP, CPU)
    assert fractions.min() >= 0 and fractions.max() < 1 and abs(fractions.mean() - 0.5) < 0.01


def test_the_numbers_never_change():
    # A resumed run continues exactly only if these stay.
    x = samples([0, 5], seed=23, epoch=2).normal((2, 2), Purpose.NOISE, CPU)
    torch.testing.assert_close(x, torch.tensor([[-0.382545, 1.089371], [0.398718, 0.522801]]), rtol=0, atol=1e-6)
    assert samples([0, 5, 9], seed=23).integers(1000, 3, Purpose.TIMESTEP, CPU).tolist() == [989, 972, 477]


def test_rows_beyond_the_batch_get_numbers_of_their_own():
    x = samples([1, 2]).normal((5, 4), Purpose.POSTERIOR, CPU)
    assert torch.equal(x[:2], samples([1, 2]).normal((2, 4), Purpose.POSTERIOR, CPU))
    assert len({tuple(row) for row in x.tolist()}) == 5


def test_without_samples_the_global_generator_is_used_as_published():
    x = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    torch.manual_seed(4)
    wanted = torch.randn_like(x), torch.randint(0, 9, (5,)), torch.rand(5)
    torch.manual_seed(4)
    for given, expected in zip(
        (normal_like(x, Purpose.NOISE), integers(9, 5, Purpose.NOISE, CPU), uniform(5, Purpose.NOISE, CPU)), wanted
    ):
        assert torch.equal(given, expected)
    with samples_set(samples([0, 1])), samples_set(None):
        assert current_samples() is None
    with samples_set(samples([0, 1])):
        torch.manual_seed(4)
        assert normal_like(x, Purpose.NOISE).dtype == torch.float64
        assert torch.equal(torch.randn_like(x), wanted[0])  # untouched
    assert current_samples() is None


@pytest.mark.parametrize("numbers", [uniform, stratified])
@pytest.mark.parametrize("given", [None, samples(range(300))])
def test_fractions_are_float32_whatever_the_default_dtype(numbers, given):
    def call():
        torch.manual_seed(0)
        with samples_set(given and replace(given, calls={})):
            return numbers(300, Purpose.TIMESTEP, CPU)

    wanted = call()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = call()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
