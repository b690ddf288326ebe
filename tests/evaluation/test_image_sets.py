"""Sets of images: what a run's dataset, a folder and an .npz give."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.folder import ImageFolder
from ldm.evaluation.image_sets import ArrayImages, DatasetImages, open_folder, read_npz


class Noise(torch.utils.data.Dataset):
    """Images of random numbers, drawn anew for each access."""

    def __init__(self, n: int = 6, shift: float = 0.0) -> None:
        self.n, self.shift = n, shift

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.rand(8, 8, 3) - self.shift, "class_label": index % 3}


def test_images_of_a_random_dataset_are_the_same_at_every_access():
    images = DatasetImages("noise", Noise(), "image", "noise")
    assert np.array_equal(images.image(2), images.image(2)) and not np.array_equal(images.image(1), images.image(2))
    assert images.image(0).dtype == np.uint8 and images.label(4) == 1


def test_the_fingerprint_covers_pixels_count_and_preprocessing():
    known = [
        DatasetImages("a", Noise(*args), "image", identity, seed).fingerprint
        for args, identity, seed in (((6,), "x", 0), ((5,), "x", 0), ((6, 0.1), "x", 0), ((6,), "y", 0), ((6,), "x", 1))
    ]
    assert len(set(known)) == 5
    assert DatasetImages("other name", Noise(), "image", "x").fingerprint == known[0]


def test_a_stream_is_read_up_to_the_limit():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter({"image": torch.zeros(4, 4, 3) + k / 9} for k in range(9))

    images = DatasetImages("stream", Stream(), "image", "", limit=4)
    assert len(images) == 4 and images.image(0).max() < images.image(3).max()


def test_a_missing_image_key_names_those_of_the_samples():
    with pytest.raises(ValueError, match="no 'edited'; they have image, class_label"):
        DatasetImages("noise", Noise(), "edited", "")


def test_a_folder_is_read_at_the_size_of_its_images_or_at_the_size_asked_for(tmp_path):
    for k in range(2):
        Image.new("RGB", (12, 8), (50 * k, 0, 0)).save(tmp_path / f"{k}.png")
    assert open_folder(tmp_path, "--images", None).image(1).shape == (8, 12, 3)
    Image.new("RGB", (24, 16)).save(tmp_path / "2.png")
    assert open_folder(tmp_path, "--images", 6).image(2).shape == (6, 6, 3)
    with pytest.raises(ValueError, match=r"images of 2 sizes \(12x8, 24x16, \.\.\.\); pass --size"):
        open_folder(tmp_path, "--images", None)


def test_the_label_of_an_image_that_takes_the_place_of_another_is_its_own(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    dataset = ImageFolder(str(tmp_path), size=8, class_labels=True, on_error="skip")
    images = DatasetImages("a", dataset, "image", "")
    assert [images.label(k) for k in range(2)] == [0, 1]
    (tmp_path / "a" / "0.png").write_bytes(b"lost")
    assert [images.label(k) for k in range(2)] == [1, 1]


def test_a_damaged_image_of_a_folder_is_named_without_settings_of_datasets(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for k in range(2):
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
    images = open_folder(tmp_path, "--images", None)
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:120])
    with pytest.raises(ValueError, match=r"1\.png.*; repair or remove it$"):
        images.image(1)


def test_an_npz_gives_images_features_or_statistics(tmp_path):
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images, np.array([1, 0]))
    arrays = read_npz(tmp_path / "a.npz", "--real")
    assert ArrayImages("a", arrays["arr_0"], arrays["arr_1"]).label(0) == 1
    np.savez(tmp_path / "f.npz", np.zeros((5, 3)))
    assert read_npz(tmp_path / "f.npz", "--real")["features"].shape == (5, 3)
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert set(read_npz(tmp_path / "s.npz", "--real")) == {"mu", "sigma"}


@pytest.mark.parametrize("arrays, words", [({"x": np.zeros(2)}, "expected arr_0"), ({"arr_0": np.zeros(3)}, "uint8")])
def test_another_npz_is_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        read_npz(tmp_path / "a.npz", "--real")
    np.save(tmp_path / "c.npy", np.zeros(3))
    cut = (tmp_path / "a.npz").read_bytes()[:-30]
    for content in (b"no zip", cut, (tmp_path / "c.npy").read_bytes()):
        (tmp_path / "b.npz").write_bytes(content)
        with pytest.raises(ValueError, match="not a readable"):
            read_npz(tmp_path / "b.npz", "--real")


@pytest.mark.parametrize("labels", [np.array([0.5, 1.0]), np.array([1]), np.array([-1, 0]), np.array([0, 10**9])])
def test_labels_of_an_npz_are_a_class_for_each_image(tmp_path, labels):
    np.savez(tmp_path / "a.npz", np.zeros((2, 4, 4, 3), np.uint8), labels)
    with pytest.raises(ValueError, match=r"arr_1 is .* expected a class >= 0 for each image"):
        read_npz(tmp_path / "a.npz", "--real")


@pytest.mark.parametrize("features", [np.zeros((1, 4)), np.full((3, 4), np.nan), np.array([["a"], ["b"]])])
def test_features_of_an_npz_are_finite_floats_of_two_images_or_more(tmp_path, features):
    np.savez(tmp_path / "a.npz", features=features)
    with pytest.raises(ValueError, match="expected finite floats"):
        read_npz(tmp_path / "a.npz", "--real")


def test_classes_of_a_folder_are_read_without_its_images(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    images = DatasetImages("f", ImageFolder(str(tmp_path), size=8, class_labels=True), "image", "f")
    monkeypatch.setattr(ImageFolder, "_load", None)
    assert [images.label(k) for k in range(2)] == [0, 1]
