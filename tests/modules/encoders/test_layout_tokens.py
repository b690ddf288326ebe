"""Bounding boxes as tokens: the encoding of the released layout model."""

import numpy as np
import pytest

from ldm.modules.encoders.layout_tokens import FULL, Box, LayoutTokens

TOKENS = LayoutTokens(num_classes=300)
BOXES = [Box(7, (0.0, 0.25, 0.5, 0.5)), Box(299, (0.5, 0.0, 0.5, 1.0), is_group=True)]


def test_a_sequence_is_30_objects_and_a_crop_in_92_tokens_of_8192():
    tokens = TOKENS.encode(BOXES)
    assert tokens.shape == (92,) == (TOKENS.length,) and tokens.dtype == np.int64
    # On a 90x90 grid in reading order: x, y -> 90 * round(89 y) + round(89 x).
    assert tokens[:6].tolist() == [7, 90 * 22, 90 * 67 + 44, 300 + 299, 44, 90 * 89 + 89]
    assert set(tokens[6:90].tolist()) == {8191} == {TOKENS.none}
    assert tokens[90:].tolist() == [0, 8099]


def test_decoding_gives_the_boxes_back_to_half_a_step_of_the_grid():
    boxes, crop = TOKENS.decode(TOKENS.encode(BOXES, crop=(0.1, 0.0, 0.75, 1.0)))
    assert [(box.category, box.is_group) for box in boxes] == [(7, False), (299, True)]
    for box, original in zip(boxes, BOXES):
        np.testing.assert_allclose(box.region, original.region, atol=1 / 89)
    np.testing.assert_allclose(crop, (0.1, 0.0, 0.75, 1.0), atol=1 / 89)


def test_mirroring_twice_changes_nothing_and_once_swaps_left_and_right():
    boxes, crop = TOKENS.decode(
        TOKENS.encode([Box(1, (0.0, 0.0, 0.25, 1.0))], crop=(0.0, 0.0, 0.5, 1.0), mirrored=True)
    )
    np.testing.assert_allclose(boxes[0].region, (0.75, 0.0, 0.25, 1.0), atol=1 / 89)
    np.testing.assert_allclose(crop, (0.5, 0.0, 0.5, 1.0), atol=1 / 89)


def test_boxes_outside_the_crop_are_skipped_and_others_keep_their_place_in_the_image():
    right_half = (0.5, 0.0, 0.5, 1.0)
    boxes = TOKENS.decode(TOKENS.encode(BOXES, crop=right_half)).boxes
    assert [box.category for box in boxes] == [299]
    np.testing.assert_allclose(boxes[0].region, BOXES[1].region, atol=1 / 89)


def test_without_crop_tokens_boxes_are_clipped_to_the_crop():
    tokens = LayoutTokens(num_classes=10, max_objects=2, encode_crop=False)
    assert tokens.length == 6
    boxes, crop = tokens.decode(tokens.encode([Box(3, (0.25, 0.0, 0.5, 0.5))], crop=(0.5, 0.0, 0.5, 0.5)))
    np.testing.assert_allclose(boxes[0].region, (0.0, 0.0, 0.5, 1.0), atol=1 / 89)
    assert crop == FULL


def test_invalid_classes_counts_and_lengths_are_refused():
    with pytest.raises(ValueError, match=r"class 300: expected 0 .. 299"):
        TOKENS.encode([Box(300, FULL)])
    with pytest.raises(ValueError, match="31 boxes: a sequence has room for 30"):
        TOKENS.encode([Box(0, FULL)] * 31)
    with pytest.raises(ValueError, match="91 tokens: expected 92"):
        TOKENS.decode(range(91))
    with pytest.raises(ValueError, match="num_classes 4096"):
        LayoutTokens(num_classes=4096)
