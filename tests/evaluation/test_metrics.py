"""Metrics of generated images, on sets whose metric is known."""

import numpy as np
import pytest

from ldm.evaluation import metrics as evaluation


def saved_images(n: int, seed: int = 0, spread: float = 0.3) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, (n, 8, 8, 1)).astype(np.float32)


def test_psnr_of_a_constant_error_is_its_closed_form():
    x = saved_images(3)
    assert evaluation.psnr(x + 0.02, x) == pytest.approx(20 * np.log10(2 / 0.02), abs=1e-3)  # 40 dB
    assert evaluation.psnr(x, x) == float("inf")
    with pytest.raises(ValueError, match="shapes"):
        evaluation.psnr(x, x[:2])


def test_pairwise_distance_counts_each_pair_of_different_images_once():
    x = np.array([0.0, 3.0, 4.0]).reshape(3, 1, 1, 1)
    assert evaluation.pairwise_distance(x) == pytest.approx((3 + 4 + 1) / 3)
    with pytest.raises(ValueError, match="at least 2"):
        evaluation.pairwise_distance(x[:1])


def test_variety_is_one_for_real_images_half_for_half_the_spread_and_zero_for_one_repeated():
    real, labels = saved_images(60), np.repeat([3, 7], 30)
    assert evaluation.variety(real, labels, real, labels) == pytest.approx({3: 1.0, 7: 1.0})
    assert evaluation.variety(0.5 * real, labels, real, labels) == pytest.approx({3: 0.5, 7: 0.5})
    repeated = np.repeat(real[:1], 30, axis=0)
    assert evaluation.variety(repeated, labels[:30], real, labels) == {3: 0.0}


def test_novelty_is_zero_for_copies_and_near_one_for_images_from_the_same_source():
    train, held_out = saved_images(200, seed=1), saved_images(200, seed=2)
    assert evaluation.novelty(train[:50], train, held_out) == 0.0
    assert evaluation.novelty(saved_images(200, seed=3), train, held_out) == pytest.approx(1.0, abs=0.03)


def test_digit_features_are_block_means_whatever_the_size():
    small = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1))
    large = small.repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3)
    assert np.allclose(evaluation.digit_features(large), ((small + 1) / 2).reshape(2, 64))
    with pytest.raises(ValueError, match="multiples of 8"):
        evaluation.digit_features(small[:, :7])


@pytest.fixture(scope="module")
def real() -> tuple[tuple, tuple]:
    pytest.importorskip("sklearn")
    from ldm.data.digits import Digits

    train, held_out = Digits("train", size=16), Digits("held_out", size=16)
    return (train.images, train.labels), (held_out.images, held_out.labels)


def test_the_judge_reads_held_out_digits(real):
    train, held_out = real
    assert evaluation.DigitClassifier(*train).accuracy(*held_out) > 0.975


def test_held_out_digits_pass_as_good_images_and_copies_and_noise_do_not(real):
    train, held_out = real
    good = evaluation.judge_digits(*held_out, train, held_out)
    assert good.recognized == good.accuracy > 0.975 and good.novelty == 1.0 and good.count == len(held_out[1])
    assert all(0.8 < figure < 1.2 for figure in good.variety.values()) and set(good.variety) == set(range(10))
    copies = evaluation.judge_digits(train[0][:200], train[1][:200], train, held_out)
    assert copies.novelty == 0.0
    noise = np.random.default_rng(0).uniform(-1, 1, (100, 16, 16, 3)).astype(np.float32)
    assert evaluation.judge_digits(noise, np.arange(100) % 10, train, held_out).recognized < 0.3
    wrong = evaluation.judge_digits(held_out[0], (held_out[1] + 1) % 10, train, held_out)
    assert wrong.recognized < 0.05


def test_a_judge_without_scikit_learn_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(ImportError, match="quickstart"):
        evaluation.DigitClassifier(saved_images(4), np.arange(4))


def test_edge_overlap_counts_the_pixels_near_an_edge_of_the_other_map():
    asked = np.zeros((2, 8, 8), bool)
    asked[0, 2], asked[1, :, 5] = True, True
    assert evaluation.edge_overlap(asked, asked, 0) == evaluation.edge_overlap(asked, asked) == 1.0
    moved = np.roll(asked, 1, axis=(1, 2))  # by one pixel, in both directions
    assert evaluation.edge_overlap(asked, moved, 0) == 0.0 and evaluation.edge_overlap(asked, moved) == 1.0
    half = asked.copy()
    half[0] = False  # one line of two is missing
    assert evaluation.edge_overlap(asked, half, 0) == pytest.approx(16 / 24)
    assert evaluation.edge_overlap(asked, np.zeros_like(asked)) == 0.0
