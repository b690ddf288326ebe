"""Open Images in its published layout: images, pairs, layouts."""

import random

import numpy as np
import pytest
from torch.utils.data import default_collate

from ldm.data import openimages
from ldm.data.base import DataConfigError
from ldm.data.openimages import (
    FullOpenImagesTrain,
    OpenImagesBBoxTrain,
    OpenImagesBBoxValidation,
    read_boxes,
    read_classes,
)
from ldm.modules.encoders.layout_tokens import FULL
from ldm.util import instantiate_from_config
from tests.data.layouts import pixels, save_image

HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
)
CLASSES = "/m/02,Tortoise\n/m/01s55n,Suitcase\n/m/01,Cat\n/m/03,Tree\n"


def row(image, label, x0, x1, y0, y1, group=0):
    return f"{image},xclick,{label},1,{x0},{x1},{y0},{y1},0,0,{group},0,0\n"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data/openimages"
    for k, name in enumerate(["train/aa.jpg", "train/0/bb.png", "train/cc.png", "validation/dd.png"]):
        save_image(root / name, k, 20, 40)
    (root / "annotations").mkdir()
    (root / "annotations/class-descriptions-boxable.csv").write_text(CLASSES)
    rows = (
        row("bb", "/m/01", 0, 0.25, 0, 0.5) + row("zz", "/m/01", 0, 1, 0, 1) + row("aa", "/m/02", 0.5, 0.75, 0.5, 1, 1)
    )
    rows += (
        row("bb", "/m/01s55n", 0.75, 1, 0, 1)
        + row("aa", "/m/01", 0, 0.5, 0, 1)
        + row("aa", "/m/03", 0, 0.001, 0, 0.001)
    )
    (root / "annotations/oidv6-train-annotations-bbox.csv").write_text(HEADER + rows)
    both = row("dd", "/m/01", 0.25, 0.75, 0, 1) + row("dd", "/m/03", 0, 1, 0, 1)
    (root / "annotations/validation-annotations-bbox.csv").write_text(HEADER + both)
    return root


@pytest.mark.parametrize(("split", "count"), [("Train", 3), ("Validation", 1)])
def test_the_published_yamls_find_the_published_place(home, split, count):
    for params in ({"size": 18, "crop_size": 16}, {"crop_size": 16}):
        dataset = instantiate_from_config({"target": f"ldm.data.openimages.FullOpenImages{split}", "params": params})
        assert len(dataset) == count and dataset[0]["image"].shape == (16, 16, 3)
    params = {
        "size": 16,
        "degradation": "bsrgan_light",
        "downscale_f": 4,
        "min_crop_f": 0.5,
        "max_crop_f": 1.0,
        "random_crop": True,
    }
    sample = instantiate_from_config(
        {"target": f"ldm.data.openimages.SuperresOpenImagesAdvanced{split}", "params": params}
    )[0]
    assert sample["image"].shape == (16, 16, 3) and sample["LR_image"].shape == (4, 4, 3)
    sample = instantiate_from_config({"target": f"ldm.data.openimages.OpenImagesBBox{split}", "params": {"size": 16}})[
        0
    ]
    assert sample["image"].shape == (16, 16, 3) and sample["coordinates_bbox"].shape == (92,)


def test_training_crops_move_and_validation_crops_do_not(home):
    random.seed(0)
    train = FullOpenImagesTrain(crop_size=16)
    assert len({train[0]["image"].tobytes() for _ in range(5)}) > 1
    validation = openimages.FullOpenImagesValidation(crop_size=16)[0]["image"]
    np.testing.assert_allclose(validation, pixels(3, 20, 40)[2:18, 12:28] / 127.5 - 1, atol=1e-6)


def test_layouts_hold_the_boxes_of_the_image_and_the_part_that_is_seen(home):
    dataset = OpenImagesBBoxValidation(size=20)
    sample = dataset[0]
    assert sample["coordinates_bbox"].dtype == np.int64
    boxes, crop = dataset.conditional_builders["coordinates_bbox"].decode(sample["coordinates_bbox"])
    found = {dataset.get_textual_label_for_category_no(box.category): box.region for box in boxes}
    np.testing.assert_allclose(found["Cat"], (0.25, 0, 0.5, 1), atol=1 / 80)
    np.testing.assert_allclose(found["Tree"], FULL, atol=1 / 80)
    np.testing.assert_allclose(crop, (0.25, 0, 0.5, 1), atol=1 / 80)  # the middle 20 of 40 columns
    batch = default_collate([sample, dataset[0]])["coordinates_bbox"]
    assert batch.shape == (2, 92) and batch.min() >= 0 and batch.max() < 8192


def test_a_layout_follows_its_crop_and_its_mirror_image(home):
    """Where the crop's tokens say a part is seen, that part is in the image."""
    random.seed(0)
    dataset = OpenImagesBBoxTrain(size=20, min_objects=1, on_error="raise")
    index = next(k for k, item in enumerate(dataset.items) if item.name == "0/bb.png")
    original = pixels(1, 20, 40) / 127.5 - 1
    seen = set()
    for _ in range(20):
        sample = dataset[index]
        boxes, (x, _, width, _) = dataset.conditional_builders["coordinates_bbox"].decode(sample["coordinates_bbox"])
        cat = [box.region for box in boxes if box.category == 0]
        mirrored = bool(cat) and cat[0][0] > 0.5
        left = round(40 * (1 - x - width if mirrored else x))
        if cat:
            expected = original[:, left : left + 20]
            np.testing.assert_allclose(sample["image"], expected[:, ::-1] if mirrored else expected, atol=1e-5)
        seen.add((bool(cat), mirrored, left))
    assert len(seen) > 6 and {s[1] for s in seen} == {True, False}


def test_images_with_too_few_or_too_many_boxes_are_left_out(home):
    assert [item.name for item in OpenImagesBBoxTrain(size=16).items] == [
        "0/bb.png",
        "aa.jpg",
    ]  # cc has none, aa's tree is a speck
    assert [item.name for item in OpenImagesBBoxTrain(size=16, min_objects=3, min_object_area=0.0).items] == ["aa.jpg"]
    assert [item.name for item in OpenImagesBBoxTrain(size=16, max_objects=2, min_object_area=0.0).items] == [
        "0/bb.png"
    ]
    with pytest.raises(DataConfigError, match="min_objects 9: no image has 9 to 30 boxes"):
        OpenImagesBBoxTrain(size=16, min_objects=9)


def test_classes_are_numbered_as_in_the_released_model(home):
    table = home / "annotations/class-descriptions-boxable.csv"
    assert list(read_classes(table)) == ["/m/01", "/m/02", "/m/03", "/m/01s55n"]  # sorted, suitcases last
    (home / "classes.txt").write_text("/m/03\n/m/01\n")
    dataset = OpenImagesBBoxTrain(size=16, object_classes=str(home / "classes.txt"), min_objects=1)
    assert dataset.object_names == {"/m/01": "Cat", "/m/03": "Tree"}
    with pytest.raises(DataConfigError, match=r"object_classes .*/m/99"):
        OpenImagesBBoxTrain(size=16, object_classes=["/m/99"])


def test_boxes_are_those_of_the_table(home):
    table = home / "annotations/oidv6-train-annotations-bbox.csv"
    boxes = read_boxes(table, {"aa": 0, "none": 1, "bb": 2}, ["/m/01", "/m/02", "/m/01s55n"])
    assert np.diff(boxes.starts).tolist() == [2, 0, 2] and boxes.of(1) == []
    assert boxes.of(0) == [(1, (0.5, 0.5, 0.25, 0.5), True), (0, (0.0, 0.0, 0.5, 1.0), False)]
    assert [box.category for box in boxes.of(2)] == [0, 2]


def test_a_bad_table_is_reported_with_its_line(home):
    table = home / "annotations/oidv6-train-annotations-bbox.csv"
    table.write_text(HEADER + row("aa", "/m/01", 0, 1, 0, 1) + row("aa", "/m/01", "x", 1, 0, 1))
    with pytest.raises(DataConfigError, match=r"bbox.csv line 3'?: unreadable"):
        OpenImagesBBoxTrain(size=16)
    table.write_text("a,b\n")
    with pytest.raises(DataConfigError, match="has no column ImageID"):
        OpenImagesBBoxTrain(size=16)


def test_tables_are_fetched_on_request_only(home, monkeypatch):
    fetched = []
    monkeypatch.setattr(openimages, "fetch", lambda remote, folder: fetched.append((remote.name, folder)))
    table = home / "annotations/oidv6-train-annotations-bbox.csv"
    table.rename(home / table.name)  # next to train/ works too
    OpenImagesBBoxTrain.prepare_data(download=True, size=16)
    assert not fetched and len(OpenImagesBBoxTrain(size=16)) == 2
    (home / table.name).unlink()
    OpenImagesBBoxTrain.prepare_data(size=16)
    assert not fetched
    with pytest.raises(
        DataConfigError,
        match=r"root 'data/openimages': has no annotations/oidv6.*; get it from https.*download to true",
    ):
        OpenImagesBBoxTrain(size=16)
    OpenImagesBBoxTrain.prepare_data(download=True, size=16)
    assert [name for name, _ in fetched] == [table.name]


def test_a_stray_quote_swallows_no_boxes_and_two_images_with_one_id_are_refused(home):
    table = home / "annotations/oidv6-train-annotations-bbox.csv"
    lines = table.read_text().splitlines(keepends=True)
    lines.insert(1, row('"yy', "/m/01", 0, 1, 0, 1))
    table.write_text("".join(lines))
    file = home / "annotations/class-descriptions-boxable.csv"
    file.write_text(CLASSES.replace("Tortoise", '"Tortoise, giant').replace("Tree", 'Tree"'))
    assert read_classes(file)["/m/01"] == "Cat"
    assert len(OpenImagesBBoxTrain(size=16, min_objects=1, object_classes=["/m/01", "/m/02"])) == 2
    save_image(home / "train/1/bb.png")
    with pytest.raises(DataConfigError, match=r"has two images with the id of 0/bb.png"):
        OpenImagesBBoxTrain(size=16)


def test_a_missing_folder_names_the_place(tmp_path):
    with pytest.raises(
        DataConfigError, match=r"root '.*/train': no such folder; set root to .*: the train/ of Open Images"
    ):
        FullOpenImagesTrain(root=str(tmp_path))
