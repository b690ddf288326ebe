"""Images of tar shards: which samples, in which order, from how many shards; filters and damage."""

import gzip
import logging
import os
from collections import Counter

import numpy as np
import pytest

from ldm.data.base import DataConfigError
from ldm.data.image import BadImageError
from ldm.data.webdataset import ImageShards
from tests.data.layouts import image_bytes, pixels, save_shard, save_shards
from tests.full.shards import once


def shards(folder, **params):
    return ImageShards(**{"shards": str(folder), "size": 8, "cache": str(folder / "cache"), **params})


def keys(dataset, indices=None):
    return [dataset[i]["__key__"] for i in (range(len(dataset)) if indices is None else indices)]


def test_a_sample_holds_its_image_caption_and_key(tmp_path):
    save_shards(tmp_path, height=8, width=8)
    data = shards(tmp_path)
    assert len(data) == 12 and data.sizes.tolist() == [[8, 8]] * 12
    sample = data[5]
    assert np.array_equal(sample["image"], pixels(5, 8, 8).astype(np.float32) / 127.5 - 1)
    assert sample["caption"] == sample["txt"] == "caption 5" and sample["__key__"] == "005"
    assert sample["file_path_"] == data.file_of(5) == str(tmp_path / "00001.tar/005")


def test_scaling_crop_flip_and_keys_are_those_of_image_folders(tmp_path):
    save_shards(tmp_path, 1, 1)
    data = shards(tmp_path, size=16, crop_size=8, flip_p=1.0, image_key="jpg", caption_key="t", templates=["a {}!"])
    assert data[0]["jpg"].shape == (8, 8, 3) and data[0]["t"] == "a caption 0!"
    plain = shards(tmp_path, size=16, crop_size=8)[0]["image"]
    assert np.array_equal(data[0]["jpg"], plain[:, ::-1])


@pytest.mark.parametrize(("ranks", "workers", "stops"), [(1, 0, 10), (2, 2, 1), (2, 0, 5), (3, 0, 4)])
def test_every_sample_comes_once_an_epoch_whatever_the_ranks_workers_and_stops(tmp_path, ranks, workers, stops):
    save_shards(tmp_path, 5, 4, height=2, width=2)
    once(shards(tmp_path, lanes=2), ranks, workers, stops, batch_size=1 if stops > 2 else 4)


def test_the_order_of_shards_is_fixed_forever(tmp_path):
    # Old runs resume exactly only if it never changes.
    save_shards(tmp_path, 3, 2)
    assert shards(tmp_path, lanes=2).order(23, 0, 4, True).tolist() == [5, 3, 4, 0, 2, 1]


def test_epochs_and_seeds_have_different_orders_and_validation_is_in_the_order_of_the_shards(tmp_path):
    save_shards(tmp_path, 3, 4)
    data = shards(tmp_path)
    orders = [tuple(data.order(seed, epoch, 4, True)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9 and all(sorted(order) == list(range(12)) for order in orders)
    assert data.order(1, 1, 4, False).tolist() == list(range(12)) and keys(data) == [f"{i:03d}" for i in range(12)]


def test_a_rank_reads_shards_of_its_own_and_few_at_a_time(tmp_path):
    save_shards(tmp_path, 8, 6, height=1, width=1)
    data = shards(tmp_path, lanes=4, min_size=1)
    order = data.order(0, 0, 8, True)
    shard_of = np.array([data.shard_of(index) for index in order])
    own = [set(shard_of[rank::2]) for rank in range(2)]
    assert not own[0] & own[1] and len(own[0]) == len(own[1]) == 4
    for start in range(0, len(order) - 8, 8):  # of all ranks
        assert len(set(shard_of[start : start + 8])) <= 2 * 4
    for index in order:
        data[index]
        assert len(data._open) <= 4


def test_shards_of_different_lengths_are_mixed_to_the_end_and_each_read_in_one_go_by_a_lane(tmp_path):
    for number, count in enumerate((9, 1, 1, 1, 6, 3, 3)):
        members = {f"{number}-{i}.png": image_bytes(height=2, width=2) for i in range(count)}
        save_shard(tmp_path / f"{number}.tar", members)
    data = shards(tmp_path, lanes=3, captions=None)
    for epoch in range(5):
        order = data.order(0, epoch, 1, True)
        assert sorted(order) == list(range(24))
        shard_of = [data.shard_of(index) for index in order]
        for lane in range(3):
            runs = [int(shard) for shard in shard_of[lane::3]]
            assert len(runs) == 8 and 1 + np.count_nonzero(np.diff(runs)) == len(set(runs))


def test_filters_leave_out_images_and_their_counts_are_logged(tmp_path, caplog):
    members = {}
    for i, (height, width, fields) in enumerate(
        [
            (8, 8, {"score": 4}),
            (8, 8, {"score": 6.5}),
            (4, 8, {"score": 7}),
            (8, 20, {"score": 8}),
            (8, 8, {"note": "5"}),
        ]
    ):
        members |= {f"{i}.png": image_bytes(i, height, width), f"{i}.txt": f"c{i}", f"{i}.json": fields}
    save_shard(tmp_path / "0.tar", members)
    filters = {"score": [5, None], "side": [6, None], "ratio": [0.5, 2.0]}
    with caplog.at_level(logging.INFO, "ldm.data.webdataset"):
        assert keys(shards(tmp_path, filters=filters)) == ["1"]
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("1 shard: 1 of 5 images, left out: 1 ") and line.count(", 1 ") == 3
    reasons = ("1 with score below 5", "1 with side below 6", "1 with ratio above 2", "1 without score")
    assert all(reason in line for reason in reasons)
    assert keys(shards(tmp_path, filters=filters, missing_fields="keep")) == ["1", "4"]
    with pytest.raises(DataConfigError, match=r"0.tar/4 has no field 'score'; set missing_fields to skip or keep"):
        shards(tmp_path, filters=filters, missing_fields="raise")
    with pytest.raises(DataConfigError, match=r"filters 'scores': no image has this field; did you mean 'score'"):
        shards(tmp_path, filters={"scores": [1, 2]})
    with pytest.raises(DataConfigError, match=r"filters 'note': this field holds text; set filters to fields with num"):
        shards(tmp_path, filters={"note": [1, 2]})
    for wrong in (5, [1], ["a", "b"], [3, 2], [float("nan"), None]):
        with pytest.raises(DataConfigError, match=r"set filters.score to \[least, most\]"):
            shards(tmp_path, filters={"score": wrong})
    with pytest.raises(
        DataConfigError, match=r"none of 5 images can be used \(.*4 with score below 9.* end in .json, .png,"
    ):
        shards(tmp_path, filters={"score": [9, None]})


def test_captions_come_from_a_text_or_from_a_field_of_the_json(tmp_path):
    fields = [{"blip": "one", "all": ["a", " b "]}, {"blip": " ", "all": []}]
    members = {f"{i}.json": each for i, each in enumerate(fields)}
    members |= {f"{i}.jpg": image_bytes(i, format="JPEG") for i in range(2)} | {
        "0.caption.txt": "long\ntext",
        "1.txt": "x",
    }
    save_shard(tmp_path / "0.tar", members)
    skip = {"missing_caption": "skip"}
    assert [shards(tmp_path, captions="json.blip", **skip)[i]["txt"] for i in range(1)] == ["one"]
    assert {shards(tmp_path, captions="json.all", **skip)[0]["txt"] for _ in range(30)} == {"a", "b"}
    assert shards(tmp_path, captions="caption.txt", **skip)[0]["txt"] == "long\ntext"
    empty = shards(tmp_path, captions="json.blip", missing_caption="empty")
    assert [empty[i]["txt"] for i in range(2)] == ["one", ""]
    with pytest.raises(DataConfigError, match=r"0.tar/0 has no caption \(no text in its .txt\)"):
        shards(tmp_path)
    assert "txt" not in shards(tmp_path, captions=None)[0]
    assert shards(tmp_path, captions="Caption.TXT", image=".JPG", **skip)[0]["txt"] == "long\ntext"
    for wrong in ("prompt", "", "json"):
        with pytest.raises(
            DataConfigError, match=r"is no suffix of texts; set captions to caption, text, txt, json\.FIELD"
        ):
            shards(tmp_path, captions=wrong)
    with pytest.raises(DataConfigError, match=r"0.tar/0: has no .avif \(it has .json, .jpg, .caption.txt\)"):
        shards(tmp_path, captions="caption.txt", image="avif", **skip)
    assert shards(tmp_path, captions="caption.txt", max_caption_chars=4, **skip)[0]["txt"] == "long"
    assert (
        len(shards(tmp_path, captions="json.blip", max_caption_chars=2, long_caption="skip", missing_caption="empty"))
        == 1
    )


def damaged(folder):
    save_shards(folder, 2, 3)
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "00002.tar").write_bytes(gzip.compress(whole))
    members = {"a.png": b"<html>", "a.txt": "x", "b.png": image_bytes(), "b.txt": b"\xff\xfe\xfa", "c.txt": "no image"}
    members |= {"d.png": image_bytes(), "d.txt": "fine", "d.json": "{", "e.png": image_bytes(), "e.txt": "fine"}
    save_shard(folder / "00003.tar", members)


def test_damaged_shards_and_records_are_left_out_and_counted(tmp_path, caplog):
    damaged(tmp_path)
    data = shards(tmp_path, on_error="skip", missing_caption="skip")
    assert keys(data)[:3] == ["000", "001", "002"] and keys(data)[-1] == "e"
    assert "breaks off at byte" in data.skipped[str(tmp_path / "00001.tar")]
    assert "not an uncompressed tar file" in data.skipped[str(tmp_path / "00002.tar")]
    reasons = Counter(data.left_out)
    assert reasons["damaged (.png: an HTML page, not an image (a failed download?))"] == 1
    assert sum(count for reason, count in reasons.items() if reason.startswith("damaged")) == 3
    assert reasons["without an image"] == 1 and "skipped 5 damaged shards or records" in caplog.text
    with pytest.raises(DataConfigError, match=r"00001.tar: breaks off at byte .*; repair it, or set on_error to skip"):
        shards(tmp_path)


def test_a_shard_with_garbage_inside_is_damaged_from_there_on(tmp_path):
    [path] = save_shards(tmp_path, 1, 3)
    content = bytearray(path.read_bytes())
    header = content.index(b"001.png")
    content[header : header + 512] = b"\x07" * 512
    path.write_bytes(content)
    assert keys(shards(tmp_path, on_error="skip")) == ["000"]
    with pytest.raises(DataConfigError, match=f"is damaged at byte {header:,}"):
        shards(tmp_path)


def test_an_image_that_cannot_be_decoded_is_replaced_by_the_next_or_raised(tmp_path):
    members = {f"{i}.png": image_bytes(i) for i in range(3)}
    members["1.png"] = members["1.png"][:300]  # its header is fine
    save_shard(tmp_path / "0.tar", members)
    with pytest.raises(BadImageError, match=r"0.tar/1: cannot be decoded .*; repair or remove it"):
        shards(tmp_path, captions=None)[1]
    skipping = shards(tmp_path, captions=None, on_error="skip")
    assert np.array_equal(skipping[1]["image"], skipping[2]["image"]) and len(skipping.skipped) == 1


def test_a_shard_that_changed_after_it_was_opened_is_named(tmp_path):
    [path] = save_shards(tmp_path, 1, 3)
    data = shards(tmp_path)
    data[0]
    path.unlink()
    assert data[1]["__key__"] == "001"  # it is still open
    data._open.clear()
    with pytest.raises(BadImageError, match=r"00000.tar: .*No such file"):
        data[1]


def test_a_sample_is_that_which_was_selected_or_an_error(tmp_path):
    fields = {name: {"score": score} for name, score in (("a", 0), ("b", 9))}
    members = {
        f"{name}.{suffix}": x for name in fields for suffix, x in (("png", image_bytes()), ("json", fields[name]))
    }
    path = save_shard(tmp_path / "0.tar", members)
    data = shards(tmp_path, captions=None, filters={"score": [5, None]})
    assert keys(data) == ["b"]
    stat = path.stat()
    with path.open("r+b") as file:  # behind its index
        file.seek(int(data._opened(0).images[1, 0]) + 40)
        file.write(b"\xff" * 8)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    data._open.clear()
    with pytest.raises(BadImageError, match=r"0.tar: was changed after it was indexed: delete .* and start again"):
        data[0]
    data._open.clear()
    save_shard(path, dict(reversed(members.items())))
    with pytest.raises(BadImageError, match=r"0.tar: was changed after it was indexed: delete .* and start again"):
        data[0]


def test_the_samples_of_a_lost_shard_are_replaced_by_those_of_others(tmp_path):
    paths = save_shards(tmp_path, 2, 25, height=2, width=2)
    data = shards(tmp_path, on_error="skip")
    paths[0].unlink()
    assert data[0]["__key__"] >= "025" and list(data.skipped) == [str(paths[0])]


def test_the_fingerprint_tells_other_samples_captions_images_and_orders_apart(tmp_path):
    [path, _] = save_shards(tmp_path, 2, 3)

    def changes(**params):
        now = shards(tmp_path, **params).fingerprint
        return {key for key in now if now[key] != first[key]}

    first = shards(tmp_path).fingerprint
    assert not changes() and not changes(lanes=2) and changes(lanes=1) == {"lanes"}
    assert "files" in changes(filters={"score": [1, None]})
    assert changes(captions=None, subject="a dog") == {"labels"}
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"caption 1", b"another 1"))
    assert changes() == {"labels"}
    members = {
        f"{i:03d}.{suffix}": x for i in range(3) for suffix, x in (("png", image_bytes(9)), ("txt", f"caption {i}"))
    }
    save_shard(path, members)
    assert changes() == {"content"}


def test_workers_do_not_share_the_positions_in_files_that_their_parent_opened(tmp_path):
    save_shards(tmp_path, 1, 12)
    data = shards(tmp_path)
    data[0]
    child = os.fork()
    if child == 0:
        os._exit(data[3]["__key__"] != "003" or data._process != os.getpid())
    assert os.waitpid(child, 0)[1] == 0 and data._process == os.getpid()


class Doubled:
    """Adds a key to a sample."""

    def __call__(self, sample):
        return {**sample, "twice": 2 * sample["image"]}


def test_a_callable_of_the_config_may_finish_each_item(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.config.instantiate._user_prefixes", ["tests"])
    save_shards(tmp_path, 1, 1)
    sample = shards(tmp_path, postprocess={"target": f"{__name__}.Doubled"})[0]
    assert np.array_equal(sample["twice"], 2 * sample["image"])
