"""Metrics of whole sets, against real ones."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from ldm.evaluation import distances, evaluate, features
from ldm.evaluation.distances import frechet_distance, precision_recall
from ldm.evaluation.evaluate import (
    Real,
    copies_of,
    figure_of,
    measure,
    paired_frechet_metric,
    real_of_images,
    real_of_statistics,
)
from ldm.evaluation.features import PixelFeatures, features_of
from ldm.evaluation.image_sets import ArrayImages
from tests.evaluation.sets import bars

PIXELS = PixelFeatures(4)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Real:
    patch = pytest.MonkeyPatch()
    patch.setattr(features, "train_classifier", partial(features.train_classifier, steps=30, progress=False))
    yield real_of_images(bars(40), lambda labels: PIXELS, bars(30, seed=1), tmp_path_factory.mktemp("cache"))
    patch.undo()


def test_metrics_are_those_of_the_features(real):
    images = bars(24, seed=2)
    found = measure(images, real)
    x = features_of(PIXELS, images)
    assert found.metrics["fid"].value == pytest.approx(frechet_distance(real.features, x))
    assert (found.metrics["precision"].value, found.metrics["recall"].value) == pytest.approx(
        precision_recall(real.features, x)
    )
    assert found.metrics["fid"].low <= found.metrics["fid"].value <= found.metrics["fid"].high
    assert found.metrics["recognized"].value > 0.9 and not found.skipped
    held_out = features_of(PIXELS, bars(30, seed=1))[:24]
    assert [*found.floor.values()] == pytest.approx([frechet_distance(real.features, each) for each in (held_out, x)])
    assert [*found.floor] == [f"Frechet distance of 24 {name}" for name in ("held-out images", "images of this card")]


def test_the_classifier_is_measured_on_the_held_out_images(real):
    classes = real.classifier.classes(torch.from_numpy(features_of(real.classifier, real.held_out))).numpy()
    assert real.accuracy.value == np.mean(classes == real.held_out.labels) > 0.9


def test_the_manifold_of_the_real_images_is_measured_once(real, monkeypatch):
    measured = []
    radii = distances.neighbor_radii
    for module in (distances, evaluate):
        monkeypatch.setattr(module, "neighbor_radii", lambda x, k: measured.append(len(x)) or radii(x, k))
    again = replace(real)
    for seed in (2, 3):
        measure(bars(24, seed=seed), again)
    assert sorted(measured) == [24, 24, 40]


def test_sets_of_few_images_have_the_metrics_that_they_allow(tmp_path):
    few = real_of_images(ArrayImages("few", bars(3).images), lambda labels: PIXELS, None, tmp_path)
    found = measure(bars(3, seed=2), few)
    assert {"fid", "kid"} <= set(found.metrics) and "more than 3 images" in found.skipped["recall"]
    assert figure_of("t", bars(3, seed=2), few, found).height > 100


def test_wrong_classes_are_not_recognized(real):
    images = bars(24, seed=2)
    images.labels = 1 - images.labels
    assert measure(images, real).metrics["recognized"].value < 0.1


def test_copies_of_the_training_set_are_listed(real):
    images = bars(10, seed=3)
    images.images[4] = real.images.image(7)
    found = measure(images, real)
    assert copies_of(found)[0] == {"image": 4, "training_image": 7, "distance": 0.0}
    assert figure_of("t", images, real, found).height > 600


def test_statistics_alone_give_the_frechet_distance_and_say_why_the_rest_is_missing(real):
    published = real_of_statistics("s.npz", PIXELS, real.stats.mean.numpy(), real.stats.cov.numpy(), None, real.cache)
    found = measure(bars(12, seed=2), published)
    assert set(found.metrics) == {"fid"} and {"kid", "precision", "recall", "copies", "recognized"} <= set(
        found.skipped
    )
    assert found.metrics["fid"].value == pytest.approx(measure(bars(12, seed=2), real).metrics["fid"].value)
    figure_of("t", bars(12, seed=2), published, found)
    with pytest.raises(ValueError, match="mu is"):
        real_of_statistics("s.npz", PIXELS, np.zeros(3), np.eye(2), None, real.cache)


def test_images_without_classes_are_not_recognized_and_without_held_out_ones_there_is_no_novelty(real):
    images = ArrayImages("a", bars(8).images)
    found = measure(images, replace(real, held_out=None))
    assert {"recognized", "novelty", "copies"} <= set(found.skipped) and "copies" not in found.metrics


def test_a_paired_distance_of_equal_images_is_zero_with_no_spread():
    x = torch.randn(20, 4).numpy()
    assert paired_frechet_metric(x, x) == pytest.approx((0, 0, 0, None), abs=1e-9)


@pytest.mark.parametrize(
    ("mu", "sigma", "words"),
    [
        (np.full(2, np.nan), np.eye(2), "expected finite floats"),
        (np.zeros(2), -np.eye(2), "not a covariance"),
        (np.array(["a", "b"]), np.eye(2), "expected finite floats"),
    ],
)
def test_statistics_that_are_none_are_refused(tmp_path, mu, sigma, words):
    with pytest.raises(ValueError, match=words):
        real_of_statistics("a.npz", PIXELS, mu, sigma, None, tmp_path)


def test_images_of_another_size_than_the_real_ones_are_refused(real):
    wide = ArrayImages("wide", np.zeros((8, 8, 40, 3), np.uint8))
    with pytest.raises(ValueError, match=r"wide: 40x8 pixels, but .*; pass --size"):
        measure(wide, real)
