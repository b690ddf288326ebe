"""Degradations: sizes, seeds, strengths; images are not shifted."""

import random
import sys

import numpy as np
import pytest

from ldm.data.superres import degrade
from ldm.modules.image_degradation import degradation_fn_bsr, degradation_fn_bsr_light
from ldm.modules.image_degradation.bsrgan import (
    BSRGAN,
    Degradation,
    add_noise,
    blur,
    compress,
    gaussian_kernel,
    resize,
)
from ldm.modules.image_degradation.bsrgan_light import BSRGAN_LIGHT

VARIANTS = [degradation_fn_bsr, degradation_fn_bsr_light]


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    np.random.seed(0)


def smooth(height=64, width=48):
    y, x = np.mgrid[:height, :width] / 64
    return np.stack([255 * y % 256, 127 * (1 + np.sin(6 * x)), 127 * (1 + np.cos(5 * y))], axis=-1).astype(np.uint8)


def area(image, factor):
    height, width = image.shape[0] // factor, image.shape[1] // factor
    return image.reshape(height, factor, width, factor, 3).mean(axis=(1, 3))


@pytest.mark.parametrize("degrade", VARIANTS)
@pytest.mark.parametrize(
    ("shape", "factor"), [((64, 48), 4), ((66, 51), 4), ((33, 20), 2), ((30, 30), 3), ((16, 16), 1), ((64, 64), 8)]
)
def test_the_result_is_smaller_by_the_factor_in_every_order(degrade, shape, factor):
    for _ in range(12):
        small = degrade(smooth(*shape), sf=factor)["image"]
        assert small.shape == (shape[0] // factor, shape[1] // factor, 3) and small.dtype == np.uint8


@pytest.mark.parametrize("degrade", VARIANTS)
def test_the_seeds_of_python_and_numpy_determine_the_result(degrade):
    def sample(seed):
        random.seed(seed)
        np.random.seed(seed)
        return [degrade(smooth())["image"] for _ in range(6)]

    first = sample(1)
    assert all((a == b).all() for a, b in zip(first, sample(1)))
    assert not all((a == b).all() for a, b in zip(first, sample(2)))
    assert not all((a == first[0]).all() for a in first)


def test_the_light_variant_stays_closer_to_the_image():
    errors = {
        d: np.mean([np.abs(d(smooth())["image"] - area(smooth(), 4)).mean() for _ in range(30)]) for d in VARIANTS
    }
    assert errors[degradation_fn_bsr_light] < 0.7 * errors[degradation_fn_bsr] and errors[degradation_fn_bsr] < 30


@pytest.mark.parametrize("resized", [0.0, 1.0])
def test_no_step_shifts_the_image(resized):
    """The center of a bright square stays in place on average."""
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[20:36, 28:44] = 255  # centered on (28, 36) between pixels
    degrade = Degradation(resized=resized, noise=(0, 0), jpeg=0.0, jpeg_quality=(95, 95), blur_scale=0.1)
    centers = []
    for _ in range(30):
        weights = degrade(image, 4).astype(float).sum(-1)
        weights[weights < 40] = 0  # traces of JPEG
        centers.append([(np.arange(16) + 0.5) @ weights.sum(1 - axis) / weights.sum() for axis in (0, 1)])
    np.testing.assert_allclose(np.mean(centers, axis=0), [28 / 4, 36 / 4], atol=0.1)


@pytest.mark.parametrize("variant", [BSRGAN, BSRGAN_LIGHT])
def test_steps_come_in_every_order_but_the_final_size_after_the_first_part(variant):
    orders = [tuple(variant._order()) for _ in range(400)]
    assert all(
        order.index("shrink") < order.index("final size") and order.count("blur") == variant.blurs for order in orders
    )
    assert {order[0] for order in orders} == {"blur", "shrink", "noise", "jpeg"} and len(set(orders)) > 20


def test_kernels_have_the_widths_asked_for():
    kernel = gaussian_kernel(41, (3.0, 1.5), angle=0.5).astype(float)
    y, x = np.mgrid[-20:21, -20:21]
    covariance = np.array(
        [[(kernel * x * x).sum(), (kernel * x * y).sum()], [(kernel * x * y).sum(), (kernel * y * y).sum()]]
    )
    np.testing.assert_allclose(np.linalg.eigvalsh(covariance), [1.5**2, 3.0**2], rtol=0.01)
    direction = np.linalg.eigh(covariance)[1][:, 1]
    np.testing.assert_allclose(abs(direction @ [np.cos(0.5), np.sin(0.5)]), 1.0, atol=1e-3)
    shifted = gaussian_kernel(41, (2.0, 2.0), shift=1.5).astype(float)
    np.testing.assert_allclose(
        [kernel.sum(), shifted.sum(), (shifted * x).sum(), (shifted * y).sum()], [1, 1, 1.5, 1.5], rtol=1e-3
    )
    assert gaussian_kernel(7, (0.0, 0.0))[3, 3] == 1 and np.isfinite(gaussian_kernel(7, (0.0, 0.0), shift=0.5)).all()
    with pytest.raises(ValueError, match="kernel size 4"):
        gaussian_kernel(4, (1.0, 1.0))


def test_blur_keeps_a_constant_image_up_to_its_borders():
    np.testing.assert_allclose(
        blur(np.full((9, 9, 3), 0.25, np.float32), gaussian_kernel(7, (2.0, 1.0), 1.0)), 0.25, atol=1e-6
    )


def test_noise_has_the_level_asked_for_and_is_gray_colored_or_correlated():
    gray = 0
    for _ in range(40):
        noise = add_noise(np.full((40, 40, 3), 0.5, np.float32), 0.02, 0.04) - 0.5
        assert noise.std() < 0.045
        if np.ptp(noise, axis=-1).max() < 1e-6:
            gray += 1
            assert abs(noise.std() - 0.02) < 0.002
    assert 8 <= gray <= 24  # of 40, with probability 0.4


def test_jpeg_keeps_the_order_of_the_colors():
    red = np.zeros((16, 16, 3), np.float32)
    red[..., 0] = 1.0
    np.testing.assert_allclose(compress(red, 95), red, atol=0.05)


def test_other_inputs_are_refused():
    with pytest.raises(ValueError, match=r"shape \(8, 8\)"):
        degradation_fn_bsr(np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match="dtype float32"):
        degradation_fn_bsr(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="downsampling by 9: an image of 8x8 supports 1 to 8"):
        degradation_fn_bsr(np.zeros((8, 8, 3), np.uint8), sf=9)


@pytest.mark.parametrize(
    "work",
    [
        lambda: blur(smooth().astype(np.float32), gaussian_kernel(5, (1.0, 1.0))),
        lambda: compress(smooth().astype(np.float32) / 255, 90),
        lambda: resize(smooth().astype(np.float32) / 255, 16, 12),
        lambda: degrade(smooth(), "cv_area", 2),
    ],
)
def test_without_opencv_the_package_to_install_is_named(work, monkeypatch):
    work()
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="pip install opencv-python-headless"):
        work()
