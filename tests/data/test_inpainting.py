"""Images with holes."""

import random

import numpy as np
import pytest

from ldm.data.base import DataConfigError
from ldm.data.inpainting import Inpainting, random_hole
from tests.data.layouts import save_image


@pytest.fixture
def dataset(tmp_path):
    save_image(tmp_path / "a.png", 0, 40, 50)
    random.seed(0)
    return Inpainting(root=str(tmp_path), size=32)


def test_the_hole_is_black_and_the_rest_is_the_image(dataset):
    for _ in range(5):
        sample = dataset[0]
        assert sample["mask"].shape == (32, 32, 1) and sample["masked_image"].shape == (32, 32, 3)
        assert sample["mask"].dtype == sample["masked_image"].dtype == np.float32 and set(
            np.unique(sample["mask"])
        ) == {-1, 1}
        hole = sample["mask"][..., 0] == 1
        assert (sample["masked_image"][hole] == -1).all()
        np.testing.assert_array_equal(sample["masked_image"][~hole], sample["image"][~hole])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96), (8, 8)])
def test_holes_take_about_the_share_asked_for(height, width):
    random.seed(0)
    for share in (0.1, 0.3, 0.6):
        shares = [random_hole(height, width, share).mean() for _ in range(30)]
        assert abs(np.mean(shares) - share) < 0.1 and min(shares) > 0 and max(shares) < 1


def test_holes_are_seeded_and_differ(dataset):
    holes = [dataset[0]["mask"] for _ in range(4)]
    random.seed(0)
    assert all((hole == dataset[0]["mask"]).all() for hole in holes)
    assert len({hole.tobytes() for hole in holes}) == 4


def test_shares_that_are_none_are_refused(tmp_path):
    with pytest.raises(DataConfigError, match=r"min_masked 0.6: expected 0 < .* max_masked is 0.5"):
        Inpainting(root=str(tmp_path), min_masked=0.6)


def test_stable_diffusions_holes_are_grey_and_some_take_the_whole_image(tmp_path):
    save_image(tmp_path / "a.png", 0, 40, 50)
    random.seed(0)
    dataset = Inpainting(root=str(tmp_path), size=32, convention="stable-diffusion", whole_p=0.5)
    samples = [dataset[0] for _ in range(20)]
    for sample in samples:
        hole = sample["mask"][..., 0] == 1
        assert set(np.unique(sample["mask"])) <= {0, 1} and sample["masked_image"].dtype == np.float32
        assert (sample["masked_image"][hole] == 0).all()
        np.testing.assert_array_equal(sample["masked_image"][~hole], sample["image"][~hole])
    assert 4 <= sum(sample["mask"].min() == 1 for sample in samples) <= 16


def test_what_is_no_convention_is_refused(tmp_path):
    with pytest.raises(
        DataConfigError, match="convention 'sd': unknown; set convention to one of ldm, stable-diffusion"
    ):
        Inpainting(root=str(tmp_path), convention="sd")
