"""The published small helpers."""

import torch

from ldm import util


def test_default_calls_functions_only_where_needed():
    assert util.default(0, lambda: 1 / 0) == 0 and util.default(None, lambda: 3) == 3 and util.default(None, 4) == 4


def test_pictures_and_maps_are_told_apart():
    assert util.isimage(torch.zeros(1, 3, 4, 4)) and not util.isimage(torch.zeros(1, 5, 4, 4)) and not util.isimage("x")
    assert util.ismap(torch.zeros(1, 5, 4, 4)) and not util.ismap(torch.zeros(1, 3, 4, 4))


def test_texts_become_pictures_in_range():
    drawn = util.log_txt_as_img((64, 32), ["a seven", "an eight"])
    assert drawn.shape == (2, 3, 32, 64) and drawn.min() >= -1 and drawn.max() <= 1 and drawn.std() > 0.05
    assert not torch.equal(drawn[0], drawn[1])


def test_counting_and_flat_means():
    assert util.count_params(torch.nn.Linear(3, 2)) == 8
    assert util.mean_flat(torch.arange(8.0).reshape(2, 2, 2)).tolist() == [1.5, 5.5]
