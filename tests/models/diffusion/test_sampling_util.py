"""Thresholds of a predicted x_0."""

import pytest
import torch

from ldm.models.diffusion.sampling_util import append_dims, norm_thresholding, spatial_norm_thresholding
from tests.reference import randn


def test_samples_and_pixels_above_the_threshold_are_scaled_down_to_it_and_others_stay():
    x = torch.cat([randn(0, 1, 4, 3, 3) * 5, randn(1, 1, 4, 3, 3) * 0.1])
    rms = norm_thresholding(x, 1.0).pow(2).flatten(1).mean(1).sqrt()
    assert torch.allclose(rms[0], torch.tensor(1.0)) and torch.equal(norm_thresholding(x, 1.0)[1], x[1])
    pixels = spatial_norm_thresholding(x, 1.0).pow(2).mean(1).sqrt()
    assert (pixels < 1 + 1e-5).all() and torch.equal(spatial_norm_thresholding(x, 100.0), x)


def test_axes_are_appended():
    assert append_dims(torch.ones(2, 3), 4).shape == (2, 3, 1, 1)
    with pytest.raises(ValueError, match="3 dims but target_dims is 2"):
        append_dims(torch.ones(1, 1, 1), 2)
