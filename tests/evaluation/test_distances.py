"""Distances of feature sets: closed forms, toy sets with a known answer, and torchmetrics."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ldm.evaluation.distances import (
    frechet_distance,
    frechet_of_statistics,
    jackknife,
    kernel_distance,
    mean_interval,
    nearest,
    precision_recall,
    realism,
    statistics,
)

pytestmark = pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features in buffer")


def features(n: int, seed: int, shift: float = 0.0, width: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(shift, 1, (n, width)) @ np.random.default_rng(9).normal(0, 0.5, (width, width))).astype(
        "float32"
    )


class PassFeatures(torch.nn.Module):
    num_features = 12

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def by_torchmetrics(metric, real: np.ndarray, generated: np.ndarray):
    metric.update(torch.from_numpy(real).double(), real=True)
    metric.update(torch.from_numpy(generated).double(), real=False)
    return metric.compute()


def test_frechet_distance_is_that_of_torchmetrics():
    a, b = features(90, 0), features(70, 1, shift=0.4)
    assert frechet_distance(a, b) == pytest.approx(
        float(by_torchmetrics(FrechetInceptionDistance(PassFeatures()), a, b)), abs=1e-4
    )


def test_frechet_distance_of_fewer_images_than_dimensions_is_that_of_torchmetrics():
    a, b = features(8, 0), features(6, 1, shift=0.4)
    assert frechet_distance(a, b) == pytest.approx(
        float(by_torchmetrics(FrechetInceptionDistance(PassFeatures()), a, b)), abs=1e-4
    )


def test_frechet_distance_of_a_shift_is_its_square_and_of_a_scale_its_closed_form():
    x = features(50, 0).astype(np.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 0.5) == pytest.approx(0.25 * x.shape[1])
    centered = x - x.mean(axis=0)
    assert frechet_distance(centered, 3 * centered) == pytest.approx(4 * float(statistics(x).cov.trace()))


@pytest.mark.parametrize("size", [20, 60])
def test_kernel_distance_is_that_of_torchmetrics_after_the_same_seed(size):
    a, b = features(60, 0), features(80, 1, shift=0.4)
    torch.manual_seed(5)
    mean, spread = by_torchmetrics(KernelInceptionDistance(PassFeatures(), subsets=7, subset_size=size), a, b)
    assert kernel_distance(a, b, subsets=7, subset_size=size, seed=5) == pytest.approx(
        (float(mean), float(spread)), abs=1e-4
    )


def test_kernel_distance_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    kernel_distance(features(9, 0), features(9, 1), subsets=2)
    assert torch.equal(torch.rand(2), wanted)


def test_precision_and_recall_of_a_toy_set_are_counted_by_hand():
    """Balls of k = 1 on a line. Real 0, 1, 10, 11: radius 1, so [-1, 2] and [9, 12]. Generated 0.5, 2.5, 5, 10: radii
    2, 2, 2.5, 5, so [-1.5, 7.5] and [5, 15].
    """
    real, generated = np.array([[0.0], [1], [10], [11]]), np.array([[0.5], [2.5], [5], [10]])
    assert precision_recall(real, generated, k=1) == (0.5, 1.0)
    assert precision_recall(generated, real, k=1) == (1.0, 0.5)


def test_a_mode_that_is_missing_costs_recall_and_one_too_many_costs_precision():
    left, right = features(40, 0, shift=-20), features(40, 1, shift=20)
    assert precision_recall(np.concatenate([left, right]), left) == (1.0, 0.5)
    assert precision_recall(left, np.concatenate([left, right])) == (0.5, 1.0)


def test_blocks_of_rows_do_not_change_precision_and_recall(monkeypatch):
    a, b = features(40, 0), features(30, 1, shift=0.3)
    whole = precision_recall(a, b)
    monkeypatch.setattr("ldm.evaluation.distances.ROWS", 7)
    assert precision_recall(a, b) == whole


def test_unusable_features_are_refused():
    x = features(5, 0)
    with pytest.raises(ValueError, match="generated: expected features"):
        precision_recall(x, x[:3])
    with pytest.raises(ValueError, match="12 and 3 dimensions"):
        frechet_distance(x, x[:, :3])
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(x, x)


def test_realism_is_the_largest_ratio_of_radius_to_distance():
    """Real 0, 1, 3, 6: radii (k = 1) 1, 1, 2, 3, of which 1 and 1 are kept. At 2 the ratios are 1/2 and 1/1."""
    real = np.array([[0.0], [1], [3], [6]])
    assert realism(np.array([[2.0], [0.5], [5]]), real, k=1).tolist() == [1.0, 2.0, 0.25]


def test_nearest_is_exact_for_copies():
    x = features(40, 0)
    distance, index = nearest(x[[7, 3]] + np.array([[0.0], [0.5]], dtype=np.float32), x)
    assert distance[0] == 0 and index[0] == 7 and distance[1] > 0


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    x = np.random.default_rng(0).normal(5, 2, 400)
    value, low, high = mean_interval(x)
    assert value == pytest.approx(x.mean()) and high - value == pytest.approx(1.96 * 2 / 20, rel=0.15)
    assert low == pytest.approx(2 * value - high)


def test_intervals_of_shares_are_wilsons():
    value, low, high = mean_interval(np.zeros(1000))
    assert (value, low) == (0.0, 0.0) and high == pytest.approx(0.00383, abs=1e-5)
    assert mean_interval(np.array([1.0] * 8 + [0.0] * 2)) == pytest.approx((0.8, 0.490, 0.943), abs=1e-3)


def test_the_interval_of_a_frechet_distance_is_the_spread_of_new_samples():
    random = np.random.default_rng(0)
    real = statistics(random.normal(size=(4000, 8)))
    values = [frechet_of_statistics(real, statistics(random.normal(1, 1, (200, 8)))) for _ in range(100)]
    x = torch.from_numpy(random.normal(1, 1, (200, 8)))
    value, low, high = jackknife(lambda chosen: frechet_of_statistics(real, statistics(x[chosen])), len(x), least=0.0)
    assert value == frechet_of_statistics(real, statistics(x)) and low == pytest.approx(max(0.0, 2 * value - high))
    assert high - value == pytest.approx(1.96 * np.std(values), rel=0.35)


def test_statistics_that_are_not_finite_have_no_distance():
    real, other = (statistics(features(50, seed)) for seed in (0, 1))
    assert np.isnan(frechet_of_statistics(real._replace(mean=real.mean * torch.nan), other))
