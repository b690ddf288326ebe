"""Extractors and the cache of features."""

import hashlib

import numpy as np
import pytest
import torch

from ldm.evaluation import features as module
from ldm.evaluation.features import (
    ClassifierFeatures,
    PixelFeatures,
    batches,
    cached,
    cached_features,
    default_extractor,
    features_of,
    inception_weights,
    labels_of,
    trained_classifier,
)
from ldm.evaluation.image_sets import ArrayImages
from tests.evaluation.sets import bars


def test_distances_of_pixel_features_are_root_mean_square_differences():
    a, b = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.full((1, 8, 8, 3), 51, dtype=torch.uint8)
    pixels = PixelFeatures()
    assert float((pixels(a) - pixels(b)).norm()) == pytest.approx(0.2)
    large = torch.full((1, 96, 64, 3), 51, dtype=torch.uint8)
    assert pixels(large).shape == (1, 32 * 21 * 3) and float(pixels(large).norm()) == pytest.approx(0.2, rel=1e-5)


def test_features_do_not_depend_on_the_batch_size():
    images = bars(7)
    assert np.array_equal(features_of(PixelFeatures(), images, 2), features_of(PixelFeatures(), images, 7))
    assert labels_of(images).tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_images_of_several_sizes_are_refused():
    images = bars(2)
    images.images = [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 6, 3), np.uint8)]
    with pytest.raises(ValueError, match=r"several sizes \(6x8, 8x8\); pass --size"):
        list(batches(images, 2))


def test_features_are_computed_once_for_the_same_images_and_extractor(tmp_path, monkeypatch):
    first = cached_features(tmp_path, PixelFeatures(), bars(5))
    monkeypatch.setattr(module, "features_of", None)
    assert np.array_equal(cached_features(tmp_path, PixelFeatures(), bars(5)), first)
    with pytest.raises(TypeError):
        cached_features(tmp_path, PixelFeatures(), bars(5, seed=1))


def test_a_cache_file_appears_whole_or_not_at_all(tmp_path):
    def fails():
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        cached(tmp_path, {"what": "x"}, fails)
    assert not list(tmp_path.iterdir())


def test_the_classifier_of_a_set_is_trained_once_and_names_its_weights(tmp_path, monkeypatch):
    images = bars(16)
    monkeypatch.setattr(module, "train_classifier", lambda *args: _train(*args, steps=2, progress=False))
    first = trained_classifier(tmp_path, images, images.labels)
    monkeypatch.setattr(module, "train_classifier", None)
    again = trained_classifier(tmp_path, images, images.labels)
    assert first.identity == again.identity and first(torch.from_numpy(images.images)).shape == (16, 64)
    weights = {name: x + 1 for name, x in first.model.state_dict().items()}
    assert ClassifierFeatures(weights, images.fingerprint).identity != first.identity


_train = module.train_classifier


def test_the_default_is_the_classifier_for_labels_and_else_what_is_at_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert default_extractor(np.zeros(2)) == "classifier" and default_extractor(None) == "pixels"
    file = tmp_path / "checkpoints" / module.INCEPTION_URL.rpartition("/")[2]
    file.parent.mkdir()
    file.write_bytes(b"")
    assert default_extractor(None) == "inception" and inception_weights(None) == file


def test_inception_weights_come_from_a_file_or_from_a_download_whose_hash_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked = []

    def download(url: str, file: str, hash_prefix: str) -> None:
        asked.append((url, hash_prefix))
        raise RuntimeError("no network\nmore")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(
        ValueError, match=r"failed \(no network\); save the file as .*, or pass its path with --weights"
    ):
        inception_weights(None)
    assert asked == [(module.INCEPTION_URL, module.INCEPTION_SHA256_PREFIX)]
    with pytest.raises(FileNotFoundError, match=r"--weights gone\.pth"):
        inception_weights("gone.pth")
    own = tmp_path / "own.pth"
    own.write_bytes(b"x")
    assert inception_weights(str(own)) == own


def test_labels_are_part_of_the_classifiers_key(tmp_path, monkeypatch):
    images = bars(8)
    keys = []
    monkeypatch.setattr(module, "cached", lambda folder, key, make: keys.append(key) or {})
    for labels in (images.labels, 1 - images.labels):
        with pytest.raises(KeyError):
            trained_classifier(tmp_path, images, labels)
    assert keys[0] != keys[1] and keys[0]["labels"] == hashlib.sha256(images.labels.tobytes()).hexdigest()


def test_a_set_without_labels_has_none():
    assert labels_of(ArrayImages("a", np.zeros((2, 4, 4, 3), np.uint8))) is None
