"""Streams are split by rank and by worker; errors of datasets name their place in the YAML."""

import pickle

import pytest
from torch.utils.data import DataLoader

from ldm.data.base import DataConfigError, Txt2ImgIterableBaseDataset


class Stream(Txt2ImgIterableBaseDataset):
    def __iter__(self):
        for i in self.valid_ids:
            yield {"id": i, "epoch": self.epoch}


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_valid_ids_are_dealt_to_ranks_and_workers_without_gap_or_repeat(world_size, workers):
    stream = Stream(valid_ids=list(range(100, 124)))
    shares = []
    for rank in range(world_size):
        stream.set_shard(rank, world_size)
        shares += [list(stream.share(worker, workers)) for worker in range(workers)]
    assert sorted(i for share in shares for i in share) == list(range(100, 124))
    assert len(stream) == 24 // world_size


def test_ranks_get_equally_many_ids():
    stream = Stream(num_records=10)
    sizes = []
    for rank in range(4):
        stream.set_shard(rank, 4)
        sizes.append(len(stream.valid_ids))
    assert sizes == [3] * 4 == [len(stream)] * 4
    few = Stream(num_records=1)
    few.set_shard(3, 4)
    assert list(few.valid_ids) == [0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loader_sees_every_sample_once(workers):
    stream = Stream(num_records=7)
    seen = [i for batch in DataLoader(stream, batch_size=2, num_workers=workers) for i in batch["id"].tolist()]
    assert sorted(seen) == list(range(7))


def test_ids_that_a_worker_function_assigns_are_taken_as_they_are():
    stream = Stream(num_records=7)
    stream.valid_ids = stream.sample_ids[2:4]
    assert [sample["id"] for sample in stream] == [2, 3]


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(ValueError, match="rank 2: expected 0"):
        Stream(num_records=4).set_shard(2, 2)


def test_a_config_error_gains_its_place_and_survives_a_worker():
    error = DataConfigError("root", "/x/y", "no such folder", "set {param} to a folder of images")
    assert str(error) == "root '/x/y': no such folder; set root to a folder of images"
    placed = error.at("data.params.train")
    expected = "data.params.train root '/x/y': no such folder; set data.params.train.params.root to a folder of images"
    assert str(placed) == str(pickle.loads(pickle.dumps(placed))) == expected
