"""The published small helpers."""

import numpy as np
import pytest
import torch

from ldm import util


def double(part):
    return np.asarray(part) * 2


def numbered(work):
    number, part = work
    return [(number, len(part))]


@pytest.mark.parametrize("cpu_intensive", [True, False])
def test_parts_of_the_data_are_processed_in_parallel_and_joined_in_order(cpu_intensive):
    options = {"n_proc": 3, "cpu_intensive": cpu_intensive}
    out = util.parallel_data_prefetch(double, np.arange(14.0).reshape(7, 2), **options)
    assert np.array_equal(out, np.arange(14.0).reshape(7, 2) * 2)
    parts = util.parallel_data_prefetch(numbered, range(7), target_data_type="list", use_worker_id=True, **options)
    assert parts == [(0, 3), (1, 3), (2, 1)]
    assert len(util.parallel_data_prefetch(len, list(range(7)), target_data_type="dict", **options)) == 3
    with pytest.raises(ValueError, match="n_proc 0"):
        util.parallel_data_prefetch(double, [1], n_proc=0)


def test_default_calls_functions_only_if_needed():
    assert util.default(0, lambda: 1 / 0) == 0 and util.default(None, lambda: 3) == 3 and util.default(None, 4) == 4


def test_images_and_maps_are_distinguished():
    assert util.isimage(torch.zeros(1, 3, 4, 4)) and not util.isimage(torch.zeros(1, 5, 4, 4)) and not util.isimage("x")
    assert util.ismap(torch.zeros(1, 5, 4, 4)) and not util.ismap(torch.zeros(1, 3, 4, 4))


def test_texts_become_images_in_range():
    images = util.log_txt_as_img((64, 32), ["a seven", "an eight"])
    assert images.shape == (2, 3, 32, 64) and images.min() >= -1 and images.max() <= 1 and images.std() > 0.05
    assert not torch.equal(images[0], images[1])


def test_counting_and_flat_means():
    assert util.count_params(torch.nn.Linear(3, 2)) == 8
    assert util.mean_flat(torch.arange(8.0).reshape(2, 2, 2)).tolist() == [1.5, 5.5]
