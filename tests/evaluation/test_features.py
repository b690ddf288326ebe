"""Extractors and the cache of features."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import Dinov2Config, Dinov2Model

from ldm.evaluation import evaluate
from ldm.evaluation import features as module
from ldm.evaluation.distances import frechet_distance
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
from ldm.modules.encoders.open_clip import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from tests.evaluation.sets import bars
from tests.modules.encoders.test_open_clip import TINY_JOINT
from tests.reference import seed_weights


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


def test_a_damaged_cache_file_is_made_anew(tmp_path, caplog):
    def make():
        return {"a": np.arange(3)}

    cached(tmp_path, {"what": "x"}, make)
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:40])
    assert cached(tmp_path, {"what": "x"}, make)["a"].tolist() == [0, 1, 2] and "made anew" in caplog.text
    with np.load(file) as arrays:
        assert arrays["a"].tolist() == [0, 1, 2]


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


TOWERS = FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
IMAGES = torch.from_numpy(bars(3, size=32).images)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_inception_gets_levels_and_the_network_that_resizes_as_tensorflow_does(tmp_path, monkeypatch):
    made = []

    class Network(torch.nn.Module):
        def __init__(self, *args: object) -> None:
            super().__init__()
            made.append(args)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.dtype == torch.uint8 and x.shape == (3, 3, 32, 32)
            return x.float().mean(dim=(2, 3))

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Network)
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"x")
    extractor = module.make_extractor("inception", str(weights), torch.device("cpu"))
    assert extractor(IMAGES).shape == (3, 3) and made == [("inception-v3-compat", ["2048"], str(weights))]
    other = tmp_path / "v.pth"
    other.write_bytes(b"y")
    assert module.make_extractor("inception", str(other), torch.device("cpu")).identity != extractor.identity


def test_fid_by_inception_is_that_of_torchmetrics_where_the_weights_are_at_hand():
    pytest.importorskip("torch_fidelity")
    file = Path(torch.hub.get_dir()) / "checkpoints" / module.INCEPTION_URL.rpartition("/")[2]
    if not file.is_file():
        pytest.skip(f"{file} is not at hand")
    metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(file))
    sets = [bars(6, seed=seed, size=32) for seed in (0, 1)]
    for images, real in zip(sets, (True, False)):
        metric.update(torch.from_numpy(images.images).permute(0, 3, 1, 2), real=real)
    extractor = module.make_extractor("inception", None, torch.device("cpu"))
    ours = frechet_distance(*(features_of(extractor, images, progress=False) for images in sets))
    assert ours == pytest.approx(float(metric.compute()), abs=1e-4)


def test_dinov2_features_are_the_class_token_of_a_folder_of_transformers(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    extractor = module.make_extractor("dinov2", str(tmp_path), torch.device("cpu"))
    x = torch.nn.functional.interpolate(IMAGES.permute(0, 3, 1, 2) / 255, (224, 224), mode="bicubic", antialias=True)
    x = (x.clamp(0, 1) - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    with torch.no_grad():
        wanted = model(x).pooler_output
    assert torch.allclose(extractor(IMAGES), wanted, atol=1e-5)
    with pytest.raises(ValueError, match=r"pass --weights FOLDER with the config\.json"):
        module.make_extractor("dinov2", str(tmp_path / "gone"), torch.device("cpu"))


def test_clip_features_and_the_clip_score_are_those_of_open_clips_towers(monkeypatch):
    torch.manual_seed(0)
    image, text = (seed_weights(tower(clip_config=TINY_JOINT, normalize=True)) for tower in TOWERS)
    for module_ in (module, evaluate):
        monkeypatch.setattr(module_, "FrozenClipImageEmbedder", lambda *args, **kwargs: image)
    monkeypatch.setattr(evaluate, "FrozenCLIPTextEmbedder", lambda *args, **kwargs: text)
    x = IMAGES.permute(0, 3, 1, 2) / 127.5 - 1
    texts = ["a row", "a column", "a row"]
    with torch.no_grad():
        wanted, cosine = image(x), torch.nn.functional.cosine_similarity(image(x), text(texts))
    extractor = module.make_extractor("clip", None, torch.device("cpu"))
    assert torch.allclose(extractor(IMAGES), wanted, atol=1e-6) and extractor.identity["version"] == "ViT-L/14"
    score = evaluate.clip_score(bars(3, size=32), texts, "ViT-L/14", "w", torch.device("cpu"))
    assert score.value == pytest.approx(float(100 * cosine.clamp(min=0).mean()), abs=1e-3)
