"""Laws of pictures with holes."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.inpainting import InpaintingFolder, draw_hole


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        Image.fromarray(np.full((24, 32, 3), 40 + 50 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_a_picture_its_hole_and_what_is_left_of_it_agree(folder):
    item = InpaintingFolder(str(folder), size=16, split=None)[2]
    image, mask, left = item["image"], item["mask"], item["masked_image"]
    assert image.shape == left.shape == (16, 16, 3) and mask.shape == (16, 16, 1)
    assert {a.dtype for a in (image, mask, left)} == {np.dtype("float32")} and set(np.unique(mask)) == {-1.0, 1.0}
    hole = mask[..., 0] > 0
    assert (left[hole] == -1).all() and (left[~hole] == image[~hole]).all()


@pytest.mark.parametrize("seed", range(40))
def test_a_hole_is_neither_empty_nor_everything(seed):
    hole = draw_hole(64, 48, np.random.default_rng(seed))
    assert hole.shape == (48, 64) and 0.01 < hole.mean() < 0.9


def test_holes_follow_the_random_numbers_in_training_and_the_picture_in_validation(folder):
    train, fixed = (InpaintingFolder(str(folder), size=16, split=None, fixed_holes=fixed) for fixed in (False, True))
    torch.manual_seed(0)
    first, second = train[0]["mask"], train[0]["mask"]
    torch.manual_seed(0)
    assert (train[0]["mask"] == first).all() and (first != second).any()
    assert (fixed[1]["mask"] == fixed[1]["mask"]).all() and (fixed[0]["mask"] != fixed[1]["mask"]).any()
