"""What a split and a class are, by the names of folders."""

import logging
import unicodedata

import pytest

from ldm.data.base import DataConfigError
from ldm.data.folder import ImageFolder
from ldm.data.previews.pytorch_dataset import PreviewsTrain
from ldm.data.splits import split_of
from tests.data.layouts import save_image


def tree(root, *names):
    for i, name in enumerate(names):
        save_image(root / name, i, 4, 4)
    return str(root)


def names(root, split, **options):
    return [item.name for item in ImageFolder(root, size=4, split=split, **options).items]


CLASSES = [f"{split}/{label}/{i}.png" for split in ("train", "test") for label in ("cat", "dog") for i in range(4)]


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        *((name, "train") for name in ("train", "Train", "TRAINING", "train2017")),
        *((name, "validation") for name in ("val", "VALID", "Validation", "dev", "val2017")),
        *((name, "test") for name in ("test", "Testing")),
        *((name, None) for name in ("trains", "test-data", "2017", "")),
    ],
)
def test_known_folder_names_are_splits_in_any_case(folder, split):
    assert split_of(folder) == split


def test_a_class_is_never_made_of_a_split_folder_and_test_images_are_never_trained_on(tmp_path, caplog):
    root = tree(tmp_path, *CLASSES)
    caplog.set_level(logging.INFO)
    train, held_out = (ImageFolder(root, size=4, split=s, class_labels=True) for s in ("train", "validation"))
    assert train.class_names == held_out.class_names == ["cat", "dog"]
    assert train.root == held_out.root == tmp_path / "train" and len(train) == 7 and len(held_out) == 1
    assert f"{tmp_path}/train: 7 images, split train of 8, 2 classes" in caplog.text
    test = ImageFolder(root, size=4, split="test", class_labels=True)
    assert test.root == tmp_path / "test" and len(test) == 8 and test.class_names == ["cat", "dog"]
    unlabelled = names(root, "train") + names(root, "validation")
    assert len(unlabelled) == 8
    with pytest.raises(DataConfigError, match="holds test/ and train/, and split is not set; set split to one of"):
        ImageFolder(root, size=4)


@pytest.mark.parametrize(("train", "validation"), [("Train", "Val"), ("training", "dev"), ("TRAIN", "valid")])
def test_each_split_is_its_folder_whatever_it_is_called(tmp_path, train, validation):
    root = tree(tmp_path, f"{train}/cat/0.png", f"{train}/dog/1.png", f"{validation}/dog/2.png", "test/cat/3.png")
    options = {"size": 4, "class_labels": True}
    found = [ImageFolder(root, split=split, **options) for split in ("train", "validation", "test")]
    assert [len(dataset) for dataset in found] == [2, 1, 1]
    assert all(dataset.class_names == ["cat", "dog"] for dataset in found)  # numbered by the training folder
    assert found[1].labels == [1]


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (["Train/0.png", "train/1.png"], "train", "Train/ and train/ in it are both named like the train split"),
        (["val/0.png", "valid/1.png", "train/2.png"], "train", "both named like the validation split"),
        (["cat/0.png", "val/1.png"], "train", "holds val/, but no folder of the train split (train, training)"),
        (["cat/0.png", "test/1.png"], "train", "holds test/, but no folder of the train split"),
        (["cat/0.png", "test/1.png"], "validation", "holds test/, but no folder of the train split"),
        (["train/0.png"], "test", "holds train/, but no folder of the test split (test, testing)"),
        (["cat/0.png", "test/1.png"], None, "holds test/, and split is not set"),
        (["images/train/0.png", "images/test/1.png"], "train", "images/test/ in it is named like the test split"),
        (["cat/train/0.png", "cat/test/1.png"], None, "cat/test/ in it is named like the test split"),
        (["testset/cat/0.png", "trainset/cat/1.png"], "train", "holds testset/ and trainset/, which may be a split"),
        (["cat/0.png", "Val_Images/1.png"], None, "holds Val_Images/, which may be a split, but is not named like one"),
        (["train/test/0.png", "train/a/1.png"], "train", "test/ in it is named like the test split"),
    ],
)
def test_a_layout_that_does_not_decide_is_refused_with_the_way_out(tmp_path, files, split, message):
    with pytest.raises(DataConfigError) as caught:
        ImageFolder(tree(tmp_path, *files), size=4, split=split)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "if it is a class, set classes to the list of all classes; otherwise rename it" in str(caught.value)


def test_words_that_only_begin_like_a_split_are_classes(tmp_path):
    root = tree(tmp_path, "test tube/0.png", "train station/1.png", "valley/2.png", "data/3.png", "test-set/4.png")
    classes = ["data", "test tube", "test-set", "train station", "valley"]
    with pytest.raises(DataConfigError, match="holds test-set/, which may be a split"):
        ImageFolder(root, size=4, class_labels=True)
    assert ImageFolder(root, size=4, class_labels=True, classes=classes).class_names == classes


def test_a_nested_folder_of_splits_names_the_root_to_set(tmp_path):
    root = tree(tmp_path, "images/train/0.png", "images/test/1.png")
    with pytest.raises(DataConfigError, match=f"set root to {tmp_path}/images with a split"):
        ImageFolder(root, size=4, split="train")


def test_a_folder_of_the_same_split_may_be_nested_but_is_no_class(tmp_path):
    root = tree(tmp_path, "train/train/0.png", "train/train/1.png")
    assert names(root, "train", validation_fraction=0) == ["train/0.png", "train/1.png"]
    with pytest.raises(DataConfigError, match="train/ in it is named like the train split"):
        ImageFolder(root, size=4, split="train", class_labels=True)


def test_listing_the_classes_allows_one_that_is_named_like_a_split(tmp_path):
    root = tree(tmp_path, "bus/0.png", "car/1.png", "train/2.png")
    options = {"size": 4, "class_labels": True}
    with pytest.raises(DataConfigError, match=r"holds train/, which has no class folders, beside bus, car; if it is a"):
        ImageFolder(root, split="train", **options)
    assert ImageFolder(root, classes=["bus", "car", "train"], **options).labels == [0, 1, 2]
    (tmp_path / "classes.txt").write_text("train\r\ncar\n\nbus\n")
    assert ImageFolder(root, classes=str(tmp_path / "classes.txt"), **options).labels == [2, 1, 0]
    with pytest.raises(DataConfigError, match=r"classes \['bus', 'bus', 'car', 'train'\]: has 'bus' twice"):
        ImageFolder(root, classes=["bus", "bus", "car", "train"], **options)
    with pytest.raises(DataConfigError, match="named like the train split"):
        ImageFolder(str(tmp_path / "bus"), size=4, class_labels=True, classes=root)


def test_folders_beside_the_splits_are_named_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert names(tree(tmp_path, "train/0.png", "val/1.png", "masks/2.png", "3.png"), "train") == ["0.png"]
    assert "not used, of no split: masks" in caplog.text


def test_published_datasets_never_train_on_test_images(tmp_path):
    root = tree(tmp_path, "train/0.png", "train/1.png", "test/2.png")
    for path in tmp_path.rglob("*.png"):
        path.with_suffix(".txt").write_text("a caption")
    assert {item.name for item in PreviewsTrain(root, size=4).items} < {"0.png", "1.png"}
    with pytest.raises(DataConfigError, match="split is not set"):
        PreviewsTrain(root, size=4, split=None)


def test_every_class_is_trained_on(tmp_path, caplog):
    root = tree(tmp_path, *(f"{k}/{i}.png" for k in range(20) for i in range(2)))
    options = {"size": 4, "class_labels": True, "validation_fraction": 0.9}
    train, held_out = (ImageFolder(root, split=split, **options) for split in ("train", "validation"))
    assert set(train.labels) == set(range(20)) and len(train) + len(held_out) == 40
    assert f"no images of {20 - len(set(held_out.labels))} of 20 classes, split validation of 40" in caplog.text


def test_a_class_with_a_line_end_in_its_name_is_refused(tmp_path):
    with pytest.raises(DataConfigError, match=r"classes 'a\\nb': has a line end in its name; rename its folder"):
        ImageFolder(tree(tmp_path, "a\nb/0.png", "c/1.png"), size=4, class_labels=True)


def test_a_split_does_not_select_from_a_list_and_is_refused_beside_one(tmp_path):
    root = tree(tmp_path, "train/0.png", "test/1.png")
    (tmp_path / "list.txt").write_text("train/0.png\ntest/1.png\n")
    with pytest.raises(DataConfigError, match="split 'train': selects nothing from the list"):
        ImageFolder(root, size=4, split="train", files=str(tmp_path / "list.txt"))
    assert len(ImageFolder(root, size=4, files=str(tmp_path / "list.txt"))) == 2


def test_a_class_in_another_unicode_normal_form_is_named(tmp_path):
    root = tree(tmp_path, f"{unicodedata.normalize('NFD', 'é')}/a.png")
    with pytest.raises(DataConfigError, match="a class in another Unicode normal form"):
        ImageFolder(root, size=4, class_labels=True, classes=[unicodedata.normalize("NFC", "é")])


@pytest.mark.parametrize("named", [False, True])
def test_a_split_of_a_list_comes_from_the_column_of_its_table_or_is_refused(tmp_path, named):
    root = tree(tmp_path, "a.png", "b.png")
    (tmp_path / "list.txt").write_text("a.png\nb.png\n")
    column = (",split", ",train", ",validation") if named else ("", "", "")
    lines = [f"{row}{end}" for row, end in zip(("file_name,text", "a.png,x", "b.png,y"), column)]
    (tmp_path / "c.csv").write_text("\n".join(lines))
    options = {"files": str(tmp_path / "list.txt"), "captions": "c.csv"}
    if named:
        assert names(root, "validation", **options) == ["b.png"]
    else:
        with pytest.raises(DataConfigError, match="split 'validation': selects nothing from the list"):
            names(root, "validation", **options)
