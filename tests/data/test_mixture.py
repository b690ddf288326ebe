"""Several datasets mixed by weight: shares, passes, order, keys."""

import itertools
from collections import Counter

import numpy as np
import pytest

from ldm.config.instantiate import ConfigError
from ldm.data.base import DataConfigError
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.mixture import Mixture
from ldm.data.order import SeededDataset
from tests.data.layouts import save_image, save_shards


@pytest.fixture(autouse=True)
def toys_may_be_built(monkeypatch):
    monkeypatch.setattr("ldm.config.instantiate._user_prefixes", ["tests"])


def numbers(length, weight=1.0):
    return {"weight": weight, "target": "tests.data.toys.Numbers", "params": {"length": length}}


def used(mixture, order):
    """The (dataset, its index) of each sample."""
    places = [mixture._place(index) for index in order]
    return [(list(mixture.parts).index(part), own) for part, own in places]


def test_an_epoch_has_the_shares_of_the_weights_and_its_length_is_exact():
    mixture = Mixture([numbers(10, 1), numbers(50, 2), numbers(7, 4)], samples=100)
    assert len(mixture) == 100 and mixture.counts.tolist() == [14, 29, 57]
    assert len(Mixture([numbers(10), numbers(50)])) == 60
    order = mixture.order(3, 0, 8, True)
    assert len(set(order)) == 100 and Counter(part for part, _ in used(mixture, order)) == {0: 14, 1: 29, 2: 57}


def test_each_sample_of_a_dataset_is_used_before_one_is_used_again():
    mixture = Mixture([numbers(10, 1), numbers(50, 2), numbers(7, 4)], samples=100)
    seen = [used(mixture, mixture.order(3, epoch, 8, True)) for epoch in range(5)]
    for number, part in enumerate(mixture.parts.values()):
        own = [index for epoch in seen for which, index in epoch if which == number]
        for start in range(0, len(own) - len(part), len(part)):
            assert sorted(own[start : start + len(part)]) == list(range(len(part)))


def test_a_sample_that_comes_twice_in_an_epoch_has_other_random_numbers():
    mixture = Mixture([numbers(3)], samples=9)
    data, order = SeededDataset(mixture, 5), mixture.order(5, 0, 3, True)
    drawn = {(sample["index"], float(sample["draw"])) for sample in (data[0, int(index)] for index in order)}
    assert len(drawn) == 9 and Counter(index for index, _ in drawn) == {0: 3, 1: 3, 2: 3}


def test_the_order_is_random_in_training_and_fixed_in_validation():
    mixture = Mixture([numbers(4, 1), numbers(8, 1)], samples=6)
    orders = {tuple(mixture.order(seed, epoch, 4, True)) for seed, epoch in itertools.product(range(3), range(3))}
    assert len(orders) == 9
    assert mixture.order(1, 5, 4, False).tolist() == [0, 1, 2, 4, 5, 6]
    # Old runs resume exactly only if it never changes.
    assert Mixture([numbers(2, 1), numbers(2, 2)], samples=3).order(23, 1, 4, True).tolist() == [3, 2, 0]


def test_folders_and_shards_mix_and_items_hold_the_keys_of_both(tmp_path):
    save_shards(tmp_path / "shards", 2, 3)
    for i in range(3):
        save_image(tmp_path / "folder" / f"{i}.png", i)
        (tmp_path / "folder" / f"{i}.txt").write_text(f"file {i}")
    folder = {"root": str(tmp_path / "folder"), "size": 8, "captions": "sidecar"}
    shards = {"shards": str(tmp_path / "shards"), "size": 8, "cache": str(tmp_path)}
    parts = [
        {"weight": 3, "target": "ldm.data.folder.ImageFolder", "params": folder},
        {"weight": 1, "target": "ldm.data.webdataset.ImageShards", "params": shards},
    ]
    config = {"target": "ldm.data.mixture.Mixture", "params": {"datasets": parts, "samples": 8}}
    module = DataModuleFromConfig(4, train=config, num_workers=0)
    module.prepare_data()
    module.setup()
    batches = list(module.train_dataloader())
    captions = [caption for batch in batches for caption in batch["caption"]]
    assert Counter(caption.split()[0] for caption in captions) == {"file": 6, "caption": 2}
    mixture = module.datasets["train"]
    assert mixture.keys == ["caption", "file_path_", "image", "txt"] and np.isfinite(mixture[3]["image"]).all()
    assert mixture.file_of(0) == tmp_path / "folder/0.png" and mixture.file_of(3).endswith("00000.tar/000")
    assert {"datasets[0] files", "datasets[1] labels", "shares"} <= mixture.fingerprint.keys()


@pytest.mark.parametrize(
    ("datasets", "samples", "message"),
    [
        ([{"weight": 1}], None, r"datasets\[0\] {}: has no target; set .* to {target: ..., params: {...}}"),
        ([], None, "datasets [] *: is empty"),
        ([numbers(3, 0)], None, r"datasets\[0\].weight 0: not a weight; set .* to a positive number"),
        ([numbers(3), numbers(3, 100)], 5, r"samples 5: an epoch of 5 samples has none of datasets\[0\]"),
        ([numbers(3), numbers(0)], None, r"datasets\[1\] 'tests.data.toys.Numbers': is empty"),
    ],
)
def test_mixtures_of_nothing_are_refused(datasets, samples, message):
    with pytest.raises(DataConfigError, match=message.replace("[] *", r"\[\] ?")):
        Mixture(datasets, samples)


def folder(root, **params):
    return {"target": "ldm.data.folder.ImageFolder", "params": {"root": str(root), "size": 8, **params}}


def test_datasets_have_images_of_one_key_and_size_and_number_their_classes_alike(tmp_path):
    for name in ("a/cat/0.png", "a/dog/0.png", "b/cat/0.png"):
        save_image(tmp_path / name)
    a, b = tmp_path / "a", tmp_path / "b"
    assert Mixture([folder(a, class_labels=True)] * 2).class_names == ["cat", "dog"]
    assert Mixture([folder(a, class_labels=True), folder(b)]).class_names is None
    for other, message in (
        (folder(b, class_labels=True), r"datasets\[1\] .*has 1 classes and datasets\[0\] 2, which differ in dog"),
        (folder(b, class_labels=True, size=4), r"its 'image' is \(4, 4, 3\), that of datasets\[0\] \(8, 8, 3\)"),
        (folder(b, image_key="jpg"), r"images have the keys jpg, .* image; set datasets\[1\].params.image_key as in"),
    ):
        with pytest.raises(DataConfigError, match=message):
            Mixture([folder(a, class_labels=True), other])


def test_errors_of_preparation_name_the_dataset():
    missing = {"target": "ldm.data.webdataset.ImageShards", "params": {"shards": "no.tar"}}
    config = {"target": "ldm.data.mixture.Mixture", "params": {"datasets": [missing]}}
    with pytest.raises(
        DataConfigError, match=r"set data.params.train.params.datasets\[0\].params.shards to .tar files"
    ):
        DataModuleFromConfig(4, train=config).prepare_data()
    Mixture.prepare_data([{"target": missing["target"]}, {}])  # reported when they are built
    with pytest.raises(ConfigError, match=r"^datasets\[0\].params: ldm.data.webdataset.ImageShards needs shards"):
        Mixture([{"target": missing["target"]}])
