"""The order of samples and their random numbers are functions of (seed, epoch, index) alone."""

import math
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.data.base import Txt2ImgIterableBaseDataset
from ldm.data.order import EpochSampler, Position, SeededDataset, StreamLoader, epoch_order
from ldm.rng import mix


class Draws(Dataset):
    """Each sample draws from all three global generators."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(()).item()


def test_mix_gives_63_bits_that_differ_for_every_input():
    seen = {
        mix(seed, purpose, epoch, index)
        for seed in range(5)
        for purpose in range(3)
        for epoch in range(10)
        for index in range(100)
    }
    assert len(seen) == 15000 and all(0 <= number < 1 << 63 for number in seen)
    assert mix(1, 2) != mix(2, 1) and mix(-1) != mix(1)


def test_the_order_of_an_epoch_is_fixed_forever():
    # Old runs resume exactly only if these never change.
    assert epoch_order(8, seed=23, epoch=0, shuffle=True).tolist() == [5, 6, 0, 1, 2, 3, 4, 7]
    assert epoch_order(8, seed=23, epoch=1, shuffle=True).tolist() == [4, 1, 6, 5, 2, 3, 7, 0]
    assert mix(23, 1, 0) == 7819552059284582382


def test_epochs_and_seeds_have_different_orders_of_the_same_samples():
    orders = {tuple(epoch_order(50, seed, epoch, True)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16 and all(sorted(order) == list(range(50)) for order in orders)
    assert epoch_order(5, 1, 1, False).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 7, 12])
def test_ranks_share_an_epoch_evenly_and_completely(length, world_size):
    shares = [list(EpochSampler(range(length), 2, 0, True, rank, world_size)) for rank in range(world_size)]
    batches = {math.ceil(len(share) / 2) for share in shares}
    assert batches == {math.ceil(length / 2 / world_size)}  # unequal numbers of steps: ranks wait forever
    filled = sum(not sampler.slice_at(Position(0, start)).size for sampler, start in last_slices(length, world_size))
    seen = [index for share in shares for _, index in share]
    assert set(seen) == set(range(length)) and len(seen) == length + filled < length + world_size


def last_slices(length, world_size):
    start = (length - 1) // (2 * world_size) * 2 * world_size
    return [(EpochSampler(range(length), 2, 0, True, rank, world_size), start) for rank in range(world_size)]


def test_the_batches_of_all_ranks_are_slices_of_one_order():
    order = epoch_order(12, 5, 2, True).tolist()
    samplers = [EpochSampler(range(12), 2, 5, True, rank, 3) for rank in range(3)]
    for sampler in samplers:
        sampler.set_epoch(2)
    shares = [[index for _, index in sampler] for sampler in samplers]
    for batch in range(2):
        together = [share[2 * batch + i] for i in range(2) for share in shares]
        assert together == order[6 * batch : 6 * batch + 6]


def test_a_position_leaves_out_what_was_used():
    whole = EpochSampler(range(10), 3, 7, True)
    whole.set_epoch(4)
    rest = EpochSampler(range(10), 3, 7, True, position=lambda: Position(4, 6))
    assert list(rest) == list(whole)[6:] and len(rest) == 10
    assert [epoch for epoch, _ in rest] == [4] * 4


class Backwards(Draws):
    def order(self, seed, epoch, batch, shuffle):
        assert (seed, shuffle, batch) == (7, True, 4)
        return np.arange(10)[::-1] + 100 * epoch


def test_a_dataset_may_have_an_order_of_its_own():
    shares = [list(EpochSampler(Backwards(), 2, 7, True, rank, 2, lambda: Position(1, 4))) for rank in range(2)]
    assert shares == [[(1, 105), (1, 103), (1, 101)], [(1, 104), (1, 102), (1, 100)]]


def test_an_order_of_another_length_is_refused():
    dataset = Backwards()
    dataset.order = lambda *_: np.arange(9)
    with pytest.raises(ValueError, match=r"Backwards.order has 9 indices for 10 samples"):
        list(EpochSampler(dataset, 2, 7, True))


def batches(workers, epoch, repeat=False, seed=3):
    sampler = EpochSampler(range(10), 3, seed, True)
    sampler.set_epoch(epoch)
    loader = DataLoader(SeededDataset(Draws(), seed, repeat), batch_size=3, sampler=sampler, num_workers=workers)
    return [[column.tolist() for column in batch] for batch in loader]


def test_workers_change_neither_order_nor_random_numbers():
    for epoch in (0, 1):
        assert batches(0, epoch) == batches(1, epoch) == batches(2, epoch)
    assert batches(0, 0) != batches(0, 1)


def draws(dataset, epoch):
    return [dataset[epoch, index] for index in range(10)]


def test_samples_draw_anew_in_every_epoch_unless_they_repeat():
    fresh, same = SeededDataset(Draws(), 3), SeededDataset(Draws(), 3, repeat=True)
    assert draws(fresh, 0) == draws(fresh, 0) != draws(fresh, 1)
    assert draws(same, 0) == draws(same, 5) == draws(fresh, 0)
    assert draws(fresh, 0) != draws(SeededDataset(Draws(), 4), 0)
    assert len({row[1:] for row in draws(fresh, 0)}) == 10
    assert fresh[4] == fresh[0, 4]


def test_reading_data_leaves_the_global_generators_alone():
    for seeder in (random.seed, np.random.seed, torch.manual_seed):
        seeder(5)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    for seeder in (random.seed, np.random.seed, torch.manual_seed):
        seeder(5)
    draws(SeededDataset(Draws(), 3), 0)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


class Fails(Draws):
    def __getitem__(self, index):
        random.random()
        raise ValueError("bad sample")


def test_an_error_in_a_sample_leaves_the_global_generators_alone_too():
    random.seed(5)
    expected = random.random()
    random.seed(5)
    with pytest.raises(ValueError, match="bad sample"):
        SeededDataset(Fails(), 3)[0]
    assert random.random() == expected


class DrawingStream(Txt2ImgIterableBaseDataset):
    """Each sample draws from all three global generators."""

    def __iter__(self):
        for i in self.valid_ids:
            yield i, random.random(), np.random.rand(), torch.rand(()).item()


def streamed(workers=0, batch_size=3, rank=0, world_size=1, position=None, seed=3, length=12):
    stream = DrawingStream(length)
    stream.set_shard(rank, world_size)
    place = None if position is None else lambda: position
    loader = StreamLoader(stream, batch_size, seed, rank, world_size, place, num_workers=workers)
    return [sample for batch in loader for sample in zip(*(column.tolist() for column in batch))]


def test_the_samples_of_a_stream_do_not_depend_on_workers_ranks_and_batches():
    whole = streamed()
    assert [index for index, *_ in whole] == list(range(12)) and len({sample[1:] for sample in whole}) == 12
    assert streamed(1) == streamed(2) == streamed(3) == streamed(2, batch_size=4) == whole
    assert sorted(streamed(2, 2, 0, 2) + streamed(0, 2, 1, 2)) == whole
    assert streamed(position=Position(0, 3)) == streamed(2, 4, position=Position(0, 3)) == whole[3:]
    assert streamed(position=Position(1, 0)) != whole != streamed(seed=4)


def test_reading_a_stream_leaves_the_global_generators_alone():
    torch.manual_seed(5)
    expected = torch.rand(()).item()
    torch.manual_seed(5)
    streamed()
    assert torch.rand(()).item() == expected
