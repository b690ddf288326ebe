"""Aspect-ratio buckets: sizes, their choice, batches of one size, and what a sample records."""

import numpy as np
import pytest

from ldm.config.instantiate import ConfigError
from ldm.data.base import DataConfigError
from ldm.data.buckets import Buckets, assign, bucket_order, kept
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.folder import ImageFolder
from ldm.data.mixture import Mixture
from ldm.data.order import EpochSampler, Position
from ldm.data.webdataset import ImageShards
from tests.data.layouts import image_bytes, save_image, save_shard

SIZES = Buckets(step=8).sizes(32)  # (height, width)
SHAPES = [(24, 48), (48, 24), (33, 40), (40, 40), (64, 60), (30, 20), (100, 50)]  # (height, width) of files


def images(count, seed=0):
    return np.random.RandomState(seed).randint(20, 200, (count, 2))


def folder_of(path, count=11, **params):
    for number in range(count):
        save_image(path / f"{number:02}.png", number, *SHAPES[number % len(SHAPES)])
    return ImageFolder(path, **{"size": 32, "buckets": {"step": 8}, **params})


def test_the_comparison_with_sizes_takes_memory_for_a_part_of_the_images_at_once(monkeypatch):
    expected, most = assign(images(50), SIZES, 4, True), []

    def counted(images, sizes, upscale):
        most.append(len(images) * len(sizes))
        return kept(images, sizes, upscale)

    monkeypatch.setattr("ldm.data.buckets.kept", counted)
    monkeypatch.setattr("ldm.data.buckets._COMPARED", 5 * len(SIZES))
    assert assign(images(50), SIZES, 4, True).tolist() == expected.tolist() and max(most) == 5 * len(SIZES)


def test_sizes_are_all_multiples_of_the_step_within_the_limits():
    sizes = {tuple(size) for size in Buckets(step=64).sizes(512).tolist()}
    assert {(512, 512), (448, 576), (384, 640), (640, 384), (256, 256)} <= sizes
    for height, width in sizes:
        assert height % 64 == width % 64 == 0 and min(height, width) >= 256 and height * width <= 512 * 512
        assert max(height, width) <= 2 * min(height, width)
    assert Buckets(step=64, min_side=512).sizes(512).tolist() == [[512, 512]]
    wide = Buckets(step=64, min_side=128, max_side=1024, max_ratio=4.0).sizes(512)
    assert wide.max() == 1024 and (wide.max(1) / wide.min(1)).max() == 4.0
    with pytest.raises(ValueError, match="no sides from 600"):
        Buckets(min_side=600).sizes(512)


def test_an_image_gets_the_size_that_keeps_most_of_it_and_none_that_enlarges_it():
    sizes = Buckets(step=64).sizes(512)

    def choice(width, height, upscale=False):
        return tuple(sizes[assign(np.array([[width, height]]), sizes, 1, upscale)[0]].tolist())

    assert choice(1000, 1000) == (512, 512) and choice(576, 448) == (448, 576)
    assert choice(3000, 1000)[1] > choice(3000, 1000)[0]  # a panorama is cropped to the widest
    assert choice(400, 300) == (256, 384)  # smaller than the area: a smaller size
    assert choice(400, 300, upscale=True) in [(448, 576), (384, 576)]
    assert kept(np.array([[200, 100]]), np.array([[50, 100]]), False) == 5000  # all of the image, at 5000 pixels
    assert kept(np.array([[200, 100]]), np.array([[50, 50]]), False) == 625  # half of it, at 2500
    assert kept(np.array([[200, 100]]), np.array([[101, 100]]), False) == -np.inf


@pytest.mark.parametrize(("count", "batch"), [(1, 4), (64, 4), (203, 8), (50, 64)])
@pytest.mark.parametrize("upscale", [False, True])
def test_every_batch_has_one_size_and_every_sample_comes_once(count, batch, upscale):
    given = images(count)
    buckets = assign(given, SIZES, batch, upscale)
    orders = [bucket_order(np.random.RandomState(epoch).permutation(count), buckets, batch) for epoch in range(2)]
    for order in orders:
        assert sorted(order) == list(range(count))
        assert all(len(set(buckets[order[k : k + batch]])) == 1 for k in range(0, count, batch))
    assert count <= batch or (orders[0] != orders[1]).any()
    if not upscale:
        assert (SIZES[buckets] <= given[:, ::-1]).all()
    best = kept(given, SIZES, upscale)
    left = best.argmax(1) != buckets
    assert left.sum() < batch * len(SIZES) and (best[np.arange(count), buckets] > 0).all()


def test_the_samples_beyond_whole_batches_are_those_that_fit_worst():
    given = np.array([[32, 32]] * 3 + [[40, 32]])  # the last one loses a fifth
    sizes = np.array([[32, 32], [16, 32]])
    assert assign(given, sizes, 3, False).tolist() == [0, 0, 0, 0]
    given = np.array([[64, 64]] * 4 + [[64, 32]] * 2)
    assert assign(given, sizes, 2, False).tolist() == [0, 0, 0, 0, 1, 1]


def test_ranks_and_stops_change_nothing(tmp_path):
    data = folder_of(tmp_path, captions=None)
    whole = data.order(5, 1, 4, True)
    for start in range(0, 11, 4):
        together = whole[start : start + 4].tolist()
        ranks = [EpochSampler(data, 2, 5, True, rank, 2).slice_at(Position(1, start)) for rank in range(2)]
        assert sorted(index for part in ranks for index in part.indices[: part.size]) == sorted(together)
        one = EpochSampler(data, 4, 5, True, position=lambda start=start: Position(1, start))
        assert [index for _, index in one] == whole[start:].tolist()
        assert len({data[index]["image"].shape for index in together}) == 1
    assert len({data[index]["image"].shape for index in range(11)}) > 1


def test_a_sample_records_its_sizes_and_its_crop(tmp_path):
    plain, flipped = folder_of(tmp_path), folder_of(tmp_path, flip_p=1.0)
    for index in range(len(SHAPES)):
        sample, mirrored = plain[index], flipped[index]
        assert sample["original_size"].tolist() == list(SHAPES[index])
        assert sample["target_size"].tolist() == list(sample["image"].shape[:2])
        assert np.array_equal(sample["image"], mirrored["image"][:, ::-1])
        (top, left), (_, right) = sample["crop_top_left"].tolist(), mirrored["crop_top_left"].tolist()
        scale = max(sample["target_size"] / sample["original_size"])
        excess = np.round(sample["original_size"] * scale) - sample["target_size"]
        assert top == excess[0] // 2 and left == excess[1] // 2 and left + right == excess[1]
    assert "target_size" not in ImageFolder(tmp_path, size=16)[0]


def test_an_unusable_image_is_replaced_by_one_of_its_size(tmp_path):
    data = folder_of(tmp_path, on_error="skip")
    data.set_batch(4)
    shapes = [data[index]["image"].shape for index in range(11)]
    (tmp_path / "00.png").write_bytes(b"")
    assert data[0]["image"].shape == shapes[0]


def test_sizes_come_from_the_index_of_shards(tmp_path):
    save_shard(tmp_path / "0.tar", {f"{n}.png": image_bytes(n, *SHAPES[n % 7]) for n in range(14)})
    data = ImageShards(str(tmp_path), 32, captions=None, buckets={"step": 8}, cache=str(tmp_path))
    order = data.order(1, 0, 4, True)
    shapes = [data[int(index)]["image"].shape for index in order]
    assert all(len(set(shapes[k : k + 4])) == 1 for k in range(0, 14, 4)) and sorted(order) == list(range(14))


def test_images_smaller_than_all_sizes_and_invalid_sections_are_refused(tmp_path):
    data = folder_of(tmp_path, buckets={"step": 8, "min_side": 24})
    with pytest.raises(DataConfigError, match=r"1 images are smaller than all sizes, first .*05.png: 20x30"):
        data.set_batch(2)
    folder_of(tmp_path, buckets={"step": 8, "min_side": 24, "upscale": True}).set_batch(2)
    advice = r"buckets.upscale to true or buckets.{} to less, or leave them out by min_size {} and on_error skip"
    for step, min_side, name, least in ((8, 24, "min_side", 24), (32, None, "step", 32)):
        with pytest.raises(DataConfigError, match=advice.format(name, least)):
            folder_of(tmp_path, buckets={"step": step, "min_side": min_side}).set_batch(2)
        folder_of(tmp_path, buckets={"step": step}, min_size=least, on_error="skip").set_batch(2)
    with pytest.raises(DataConfigError, match="cannot be used with buckets"):
        folder_of(tmp_path, crop_size=16)
    with pytest.raises(DataConfigError, match="steps"):
        folder_of(tmp_path, buckets={"steps": 8})


def test_the_fingerprint_tells_other_sizes_of_images_apart(tmp_path):
    before = folder_of(tmp_path).fingerprint
    save_image(tmp_path / "00.png", 0, 20, 40)
    after = folder_of(tmp_path, count=0).fingerprint
    assert {key for key in before if before[key] != after[key]} == {"content", "sizes"}


def test_another_batch_at_resume_is_refused(tmp_path):
    folder_of(tmp_path)
    node = {"target": "ldm.data.folder.ImageFolder", "params": {"root": str(tmp_path), "size": 32}}
    state = {"seed": 1, "epoch": 0, "samples": 4, "trained": 1, "global_batch_size": 4}
    for buckets, refused in (({"step": 8}, True), (None, False)):
        node["params"]["buckets"] = buckets
        data = DataModuleFromConfig(2, train=node)
        data.setup()
        if refused:
            with pytest.raises(ConfigError, match="batches of 2 samples of all devices, previously 4"):
                data.load_state_dict(state)
            data.datasets["train"].buckets = Buckets(step=8, min_side=32)
            data.datasets["train"].bucket_sizes = np.array([[64, 64]])
            with pytest.raises(DataConfigError, match=r"set data.params.train.params.buckets.upscale to true"):
                data.train_dataloader()
            continue
        data.load_state_dict(state)


def test_a_part_of_another_dataset_has_no_buckets(tmp_path):
    folder_of(tmp_path)
    part = {
        "target": "ldm.data.folder.ImageFolder",
        "params": {"root": str(tmp_path), "size": 32, "buckets": {"step": 8}},
    }
    with pytest.raises(DataConfigError, match=r"buckets.*part of another dataset"):
        Mixture([part])
