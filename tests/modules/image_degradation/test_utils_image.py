"""The published image helpers."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.modules.image_degradation import utils_image as util

IMAGE = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)


def test_an_image_is_read_as_it_was_written(tmp_path):
    util.mkdirs(str(tmp_path / "a" / "b"))
    util.imsave(IMAGE, tmp_path / "a" / "b" / "x.png")
    assert np.array_equal(util.imread_uint(tmp_path / "a" / "b" / "x.png"), IMAGE)
    gray = util.imread_uint(tmp_path / "a" / "b" / "x.png", n_channels=1)
    assert gray.shape == (12, 10, 1) and gray.dtype == np.uint8
    with pytest.raises(ValueError, match="n_channels 4"):
        util.imread_uint(tmp_path / "a" / "b" / "x.png", n_channels=4)


def test_number_formats_are_inverse_to_each_other():
    assert np.array_equal(util.single2uint(util.uint2single(IMAGE)), IMAGE)
    assert np.array_equal(util.tensor2uint(util.uint2tensor4(IMAGE)), IMAGE)
    assert util.uint2tensor3(IMAGE).shape == (3, 12, 10) and util.single2tensor4(IMAGE).shape == (1, 3, 12, 10)


@pytest.mark.parametrize("scale", [0.5, 0.25, 2.0, 1 / 3])
def test_a_resize_keeps_constants_and_agrees_with_pillows_bicubic_filter_inside(scale):
    assert np.allclose(util.imresize_np(np.full((9, 12), 0.3), scale), 0.3)
    x = np.random.default_rng(1).random((48, 48)).astype(np.float32)
    out = util.imresize_np(x, scale)
    size = int(np.ceil(48 * scale))
    pillow = np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC))
    inner = (slice(3, -3), slice(3, -3))
    assert out.shape == (size, size) and np.allclose(out[inner], pillow[inner], atol=1e-5)


def test_a_tensor_is_resized_like_an_array():
    x = torch.rand(3, 8, 8)
    assert np.allclose(util.imresize(x, 0.5).permute(1, 2, 0), util.imresize_np(x.permute(1, 2, 0).numpy(), 0.5))
    assert util.bicubic_degradation(np.ones((9, 9, 3)), 3).shape == (3, 3, 3)


def test_color_and_psnr_are_matlabs():
    white, black = np.full((2, 2, 3), 255, np.uint8), np.zeros((2, 2, 3), np.uint8)
    assert (util.rgb2ycbcr(white) == 235).all() and (util.rgb2ycbcr(black) == 16).all()
    assert np.array_equal(util.rgb2ycbcr(white, only_y=False)[0, 0], [235, 128, 128])
    assert util.calculate_psnr(white, black) == 0.0 and util.calculate_psnr(white, white) == float("inf")
    assert util.modcrop(IMAGE, 4).shape == (12, 8, 3)
