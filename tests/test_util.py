"""The published small helpers."""

import torch

from ldm import util


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
