"""Images with a map of classes: cut alike, one-hot, and refused where they do not fit."""

import random

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from ldm.data.base import DataConfigError
from ldm.data.image import BadImageError
from ldm.data.landscapes import RFWTrain, RFWValidation, SegmentedImages
from ldm.util import instantiate_from_config


def pair(home, name, height=20, width=30):
    """An image whose red is the class of its map."""
    numbers = np.random.RandomState(len(name)).randint(0, 182, (height, width), dtype=np.uint8)
    for folder, pixels, suffix in (("images", np.stack([numbers] * 3, -1), ".png"), ("segmentations", numbers, ".png")):
        path = (home / "data/rfw" / folder / name).with_suffix(suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return numbers


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train/a/one.png", "train/two.png", "validation/three.png"):
        pair(tmp_path, name)
    return tmp_path


def test_the_published_yaml_gives_one_hot_maps(home):
    for split, count in (("Train", 2), ("Validation", 1)):
        params = {"size": 20, "crop_size": 16, "segmentation_to_float32": True}
        dataset = instantiate_from_config(
            OmegaConf.create({"target": f"ldm.data.landscapes.RFW{split}", "params": params})
        )
        assert len(dataset) == count
        sample = dataset[0]
        assert sample["image"].shape == (16, 16, 3) and sample["segmentation"].shape == (16, 16, 182)
        assert sample["segmentation"].dtype == np.float32 and (sample["segmentation"].sum(-1) == 1).all()


def test_image_and_map_are_cropped_and_flipped_alike(home):
    random.seed(0)
    dataset = RFWTrain(size=None, crop_size=12, flip_p=0.5)
    for _ in range(10):
        sample = dataset[0]
        red = np.rint((sample["image"][..., 0] + 1) * 127.5)
        assert (sample["segmentation"].argmax(-1) == red).all()


def test_scaled_maps_hold_no_classes_in_between(home):
    sample = RFWValidation(size=10, crop_size=10)[0]
    numbers = np.asarray(Image.open("data/rfw/segmentations/validation/three.png"))
    assert sample["segmentation"].dtype == np.uint8
    assert set(sample["segmentation"].argmax(-1).ravel().tolist()) <= set(numbers.ravel().tolist())


def test_without_split_folders_the_images_are_divided(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in range(6):
        pair(tmp_path, f"{k}.png")
    train, validation = (cls(size=16, crop_size=16, validation_fraction=0.34) for cls in (RFWTrain, RFWValidation))
    assert (
        len(train) == 4
        and len(validation) == 2
        and not {i.name for i in train.items} & {i.name for i in validation.items}
    )
    assert train[3]["segmentation"].shape == (16, 16, 182)


def folder(tmp_path, numbers, size=None):
    numbers = np.asarray(numbers, dtype=np.uint8)
    for name in ("images", "maps"):
        (tmp_path / name).mkdir(exist_ok=True)
    Image.fromarray(numbers).save(tmp_path / "maps/a.png")
    Image.new("RGB", size or numbers.shape[::-1]).save(tmp_path / "images/a.png")
    return {"root": str(tmp_path / "images"), "segmentation_root": str(tmp_path / "maps"), "size": 2}


def test_pixels_without_a_class_are_zeros_or_class_zero(tmp_path):
    params = folder(tmp_path, [[0, 255], [2, 1]])
    maps = SegmentedImages(**params, n_labels=3)[0]["segmentation"]
    assert maps.sum(-1).tolist() == [[1, 0], [1, 1]] and maps[1, 0].tolist() == [0, 0, 1]
    shifted = SegmentedImages(**params, n_labels=4, shift_segmentation=True)[0]["segmentation"]
    assert shifted.argmax(-1).tolist() == [[1, 0], [3, 2]] and (shifted.sum(-1) == 1).all()


def test_maps_that_do_not_fit_are_refused_or_skipped(tmp_path):
    with pytest.raises(BadImageError, match=r"a.png: has class 182, but n_labels is 182"):
        SegmentedImages(**folder(tmp_path, [[182, 0], [0, 0]]))[0]
    with pytest.raises(BadImageError, match=r"maps/a.png: is 2x2, but its image is 3x2"):
        SegmentedImages(**folder(tmp_path, [[0, 0], [0, 0]], (3, 2)))[0]
    (tmp_path / "maps/a.png").unlink()
    with pytest.raises(BadImageError, match=r"maps/a.png: no such file"):
        SegmentedImages(root=str(tmp_path / "images"), segmentation_root=str(tmp_path / "maps"), size=2)[0]
    Image.new("RGB", (4, 4)).save(tmp_path / "images/b.png")
    Image.new("L", (4, 4)).save(tmp_path / "maps/b.png")
    kept = SegmentedImages(
        root=str(tmp_path / "images"), segmentation_root=str(tmp_path / "maps"), size=2, on_error="skip"
    )
    assert [item.name for item in kept.items] == ["b.png"] and "no such file" in kept.skipped["a.png"]


def test_missing_folders_are_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataConfigError, match=r"segmentation_root 'data/rfw/segmentations': no such folder; set segmentation_root"
    ):
        RFWTrain()
    (tmp_path / "data/rfw/segmentations").mkdir(parents=True)
    with pytest.raises(DataConfigError, match=r"root 'data/rfw/images': no such folder"):
        RFWTrain()
    with pytest.raises(DataConfigError, match=r"n_labels 256: not a number of classes; set n_labels to 1 .. 255"):
        RFWTrain(n_labels=256)
