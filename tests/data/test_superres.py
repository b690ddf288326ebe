"""Pairs for super-resolution: every degradation, their sizes and seeds."""

import random

import numpy as np
import pytest
from PIL import Image

from ldm.data.base import DataConfigError
from ldm.data.superres import DEGRADATIONS, SuperResolution, degrade
from tests.data.layouts import save_image


@pytest.fixture
def folder(tmp_path):
    save_image(tmp_path / "large.png", 0, 100, 120)
    save_image(tmp_path / "small.png", 1, 20, 26)
    return str(tmp_path)


def seeded(dataset, index, seed=0):
    random.seed(seed)
    np.random.seed(seed)
    return dataset[index]


@pytest.mark.parametrize("degradation", DEGRADATIONS)
def test_a_pair_has_the_sizes_and_ranges_asked_for(folder, degradation):
    dataset = SuperResolution(root=folder, size=32, degradation=degradation, downscale_f=4)
    for index in range(2):
        sample = seeded(dataset, index)
        assert sample["image"].shape == (32, 32, 3) and sample["LR_image"].shape == (8, 8, 3)
        for key in ("image", "LR_image"):
            assert sample[key].dtype == np.float32 and -1 <= sample[key].min() < sample[key].max() <= 1


def test_the_small_image_is_the_large_one_degraded(folder):
    sample = seeded(SuperResolution(root=folder, size=32, degradation="pil_box"), 0)
    np.testing.assert_allclose(
        sample["LR_image"], sample["image"].reshape(8, 4, 8, 4, 3).mean(axis=(1, 3)), atol=1 / 127
    )


def test_the_square_is_a_share_of_the_image_and_seeded(folder):
    whole = SuperResolution(root=folder, size=20, min_crop_f=1.0, random_crop=False, degradation="pil_nearest")[1][
        "image"
    ]
    original = np.asarray(Image.open(folder + "/small.png"))[:, 3:23] / 127.5 - 1
    np.testing.assert_allclose(whole, original, atol=1e-6)
    dataset = SuperResolution(root=folder, size=32)
    assert (seeded(dataset, 0)["LR_image"] == seeded(dataset, 0)["LR_image"]).all()
    assert (seeded(dataset, 0)["image"] != seeded(dataset, 0, seed=1)["image"]).any()


def test_nearest_degradations_take_pixels_and_area_their_mean():
    image = np.random.RandomState(0).randint(0, 256, (8, 12, 3), dtype=np.uint8)
    np.testing.assert_allclose(degrade(image, "cv_area", 4), image.reshape(2, 4, 3, 4, 3).mean(axis=(1, 3)), atol=0.51)
    np.testing.assert_array_equal(degrade(image, "cv_nearest", 4), image[::4, ::4])
    np.testing.assert_array_equal(degrade(image, "pil_nearest", 4), image[2::4, 2::4])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"degradation": "bsr"},
            "degradation 'bsr': unknown; set degradation to one of bsrgan, bsrgan_light, cv_nearest",
        ),
        ({"size": 30}, "downscale_f 4: does not divide size 30"),
        ({"size": [32, 32]}, "size .* not the side of a square"),
        ({"min_crop_f": 0.9, "max_crop_f": 0.5}, "min_crop_f 0.9: expected 0 < .* max_crop_f is 0.5"),
        ({"crop_size": 16}, "crop_size 16: has no effect"),
    ],
)
def test_what_cannot_be_is_refused(folder, params, message):
    with pytest.raises(DataConfigError, match=message):
        SuperResolution(**{"root": folder, "size": 32, **params})
