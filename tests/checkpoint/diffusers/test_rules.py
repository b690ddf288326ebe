"""Rules split and join tensors as inverse maps."""

import pytest
import torch

from ldm.checkpoint.diffusers import rules


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("kernel", [0, 1])
def test_queries_keys_and_values_are_split_by_head_and_joined_again(heads, kernel):
    tensor = torch.randn(24, 8, 1) if kernel else torch.randn(24)
    parts = rules.by_head(heads, kernel).split(tensor)
    assert [part.shape for part in parts] == ([(8, 8)] * 3 if kernel else [(8,)] * 3)
    assert torch.equal(rules.by_head(heads, kernel).join(parts), tensor)
    width = 8 // heads
    second_key = tensor[
        3 * width + width if heads > 1 else width
    ]  # first row of the last key that a stacking would misplace
    assert torch.equal(parts[1][width if heads > 1 else 0], second_key.flatten() if kernel else second_key)
