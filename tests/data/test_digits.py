"""The digits: a fixed, stratified split, images as the models take them, and captions in several phrasings."""

import builtins
import sys

import numpy as np
import pytest
import torch

from ldm.data import digits as module

datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def splits() -> dict[str, module.Digits]:
    return {split: module.Digits(split) for split in ("train", "held_out", "all")}


def test_train_and_held_out_are_a_partition_of_all_scans(splits):
    labels = module.load_scans()[1]
    train, held_out = (set(module.split_indices(labels, split)) for split in ("train", "held_out"))
    assert not train & held_out
    assert train | held_out == set(range(1797)) == set(module.split_indices(labels, "all"))
    assert (len(splits["train"]), len(splits["held_out"]), len(splits["all"])) == (1442, 355, 1797)


def test_every_digit_has_the_same_share_held_out(splits):
    share = np.bincount(splits["held_out"].labels) / np.bincount(splits["all"].labels)
    assert share.shape == (10,) and share.min() > 0.19 and share.max() <= 0.2


def test_the_split_never_changes():
    assert module.split_indices(np.arange(20) % 2, "held_out").tolist() == [8, 9, 18, 19]


def test_images_are_hwc_float32_dark_ink_on_white(splits):
    image = splits["train"][0]["image"]
    assert image.shape == (32, 32, 3) and image.dtype == np.float32
    assert image.min() < -0.8 and image[0, 0, 0] == 1.0 and image.mean() > 0
    assert np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2])
    assert np.abs(splits["all"].images).max() <= 1


def test_the_upscaled_image_is_the_scan_within_a_white_margin():
    scan = module.load_scans()[0][3]
    ink = (1 - module.upscale_scan(scan, 40)[..., 0]) / 2
    small = ink.reshape(10, 4, 10, 4).mean(axis=(1, 3))
    assert np.corrcoef(small[1:-1, 1:-1].ravel(), scan.ravel())[0, 1] > 0.98
    edge = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
    assert edge.max() < 0.01


def test_inverted_digits_are_white_on_black(splits):
    assert np.array_equal(module.Digits("held_out", inverted=True).images, -splits["held_out"].images)


def test_slanted_digits_lean_to_the_right():
    """The ink of each row moves by tan(slant) per row, and the middle row stays."""
    scan = np.zeros((8, 8))
    scan[:, 3:5] = 16
    upright, leaning = (1 - module.upscale_scan(scan, 60)[..., 0], 1 - module.upscale_scan(scan, 60, 20.0)[..., 0])
    columns = [(ink * np.arange(60)).sum(axis=1)[12:48] / ink.sum(axis=1)[12:48] for ink in (upright, leaning)]
    moved = columns[1] - columns[0]
    assert np.allclose(moved, -np.tan(np.radians(20)) * (np.arange(12, 48) + 0.5 - 30), atol=0.1)


def test_captions_name_the_digit_of_the_image(splits):
    for index in range(0, 200, 7):
        item = splits["train"][index]
        digit = item["class_label"]
        assert item["human_label"] == module.WORDS[digit]
        assert item["caption"] in module.captions(digit)
        assert str(digit) in item["caption"] or module.WORDS[digit] in item["caption"]


def test_no_caption_stands_for_two_digits():
    every = [caption for digit in range(10) for caption in module.captions(digit)]
    assert len(set(every)) == len(every) > 10_000
    assert module.captions(7)[:2] == [
        "a handwritten seven",
        "a handwritten 7",
    ] and "draw an eight, please" in module.captions(8)


def test_training_captions_come_from_many_phrasings_by_torchs_generator(splits):
    torch.manual_seed(0)
    first = [splits["train"][5]["caption"] for _ in range(400)]
    torch.manual_seed(0)
    assert [splits["train"][5]["caption"] for _ in range(400)] == first
    assert set(first) < set(module.captions(splits["train"][5]["class_label"])) and len(set(first)) > 150
    plain = set(module.captions(splits["train"][5]["class_label"])[: module.PLAIN])
    assert plain < set(first) and 0.4 < np.mean([caption in plain for caption in first]) < 0.65


def test_held_out_captions_never_change(splits):
    assert [splits["held_out"][k]["caption"] for k in range(30)] == [
        splits["held_out"][k]["caption"] for k in range(30)
    ]


def test_other_sizes(splits):
    assert module.Digits("held_out", size=16)[0]["image"].shape == (16, 16, 3)


@pytest.mark.parametrize("arguments", [{"split": "validation"}, {"size": 4}])
def test_wrong_arguments_are_refused_with_the_choices(arguments):
    with pytest.raises(ValueError, match=r"; set (split|size) to "):
        module.Digits(**arguments)


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    module.load_scans.cache_clear()
    with pytest.raises(ImportError, match="quickstart"):
        module.Digits()


def test_the_scans_are_those_of_scikit_learn_and_are_read_without_its_import(monkeypatch):
    digits = datasets.load_digits()
    real_import = builtins.__import__

    def without_sklearn(name, *rest, **kwargs):
        assert not name.startswith("sklearn")
        return real_import(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    module.load_scans.cache_clear()
    scans, labels = module.load_scans()
    assert np.array_equal(scans, digits.images) and scans.dtype == digits.images.dtype
    assert np.array_equal(labels, digits.target) and labels.dtype == np.int64


def test_edits_widen_or_narrow_the_strokes_of_the_same_digit():
    before = module.Digits("held_out").images[0]
    thick, thin = (module.edited(before, name) for name in ("thick", "thin"))
    ink = {name: float((1 - image).mean() / 2) for name, image in (("thin", thin), ("plain", before), ("thick", thick))}
    assert (thick <= before).all() and (thin >= before).all()
    assert ink["thin"] < 0.75 * ink["plain"] and ink["plain"] < 0.75 * ink["thick"]
    dataset = module.DigitEdits("held_out")
    for k in range(12):
        sample = dataset[k]
        (name,) = [name for name, texts in module.EDITS.items() if sample["edit"]["c_crossattn"] in texts]
        np.testing.assert_array_equal(sample["edited"], module.edited(sample["edit"]["c_concat"], name))
    assert module.DigitEdits("held_out", edits=["thin"])[5]["edit"]["c_crossattn"] in module.EDITS["thin"]
    torch.manual_seed(0)
    train = module.DigitEdits("train")
    assert len({train[0]["edit"]["c_crossattn"] for _ in range(200)}) == 8
    with pytest.raises(module.DataConfigError, match="edits 'bold': unknown; set edits to one of thick, thin"):
        module.DigitEdits(edits=["bold"])


def test_some_digits_with_captions_of_their_own():
    dataset = module.Digits(digits=[7, 1], count=9, templates=["a {}", "the {}"], subject="<it>")
    assert len(dataset) == 9 and set(dataset.labels) == {1, 7}
    assert {dataset[0]["caption"] for _ in range(30)} == {"a <it>", "the <it>"}
