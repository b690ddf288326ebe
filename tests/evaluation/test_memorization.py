"""Audit of copied training images."""

import numpy as np
import pytest

from ldm.evaluation.memorization import audit


def points(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (n, 6))


def test_copies_are_flagged_with_their_training_image_and_new_images_are_not():
    training, held_out, new = points(300, 0), points(200, 1), points(100, 2)
    copies = training[[5, 9]] + 1e-4
    found = audit(np.concatenate([new, copies]), training, held_out)
    assert set(found.flagged) >= {100, 101} and len(found.flagged) <= 2 + 4  # 1 % of new ones by chance
    assert found.neighbor[[100, 101]].tolist() == [5, 9]
    assert audit(new, training, held_out).novelty == pytest.approx(1, abs=0.1)
    assert audit(training, training, held_out).novelty == 0 and audit(training, training, held_out).share.value == 1


def test_of_held_out_images_themselves_about_one_in_a_hundred_is_below_the_threshold():
    training, held_out = points(300, 0), points(400, 1)
    assert audit(held_out, training, held_out).share.value == pytest.approx(0.01, abs=0.002)


def test_without_held_out_images_only_exact_copies_are_flagged():
    training, new = points(30, 0), points(20, 1)
    found = audit(np.concatenate([new, training[4:5]]), training, None)
    assert found.flagged.tolist() == [20] and found.novelty is None
