"""Shards from folders and tables: content, resume, images that cannot be used."""

import json
import tarfile
import threading

import pytest
from PIL import Image

from ldm.data import shard_writer
from ldm.data.image import BadImageError, load_image
from ldm.data.shard_writer import Layout, Selection, write_shards
from ldm.data.webdataset import ImageShards
from tests.data.layouts import save_image


@pytest.fixture
def folder(tmp_path):
    """Ten captioned images, of which one is broken."""
    root = tmp_path / "images"
    rows = ["file_name,text,score,note,id"]
    for i in range(10):
        save_image(root / f"{i}.png", i, 8 + i, 12)
        rows += [f"{i}.png,caption {i},{i / 2},n{i},00{i}"]
    (root / "captions.csv").write_text("\n".join([*rows, "0.png,another,1,x,000"]))
    (root / "3.png").write_bytes(b"")
    return root


def selection(root, **options):
    return Selection(str(root), captions="captions.csv", **{"on_error": "skip", **options})


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".npz"}


def test_shards_hold_every_usable_image_with_its_captions_and_fields(folder, tmp_path):
    out = tmp_path / "out"
    done = write_shards(selection(folder), out, Layout(samples=4), workers=2)
    assert done[:3] == (3, 3, 9) and done.sides == (8, 12, 12) and done.skipped == {"empty file": 1}
    assert done.bytes == sum(path.stat().st_size for path in out.glob("*.tar"))
    data = ImageShards(str(out), 8, captions="txt", filters={"score": [1, 3]}, on_error="raise")
    assert sorted(data[i]["txt"] for i in range(len(data))) == [f"caption {i}" for i in (2, 4, 5, 6)]
    every = ImageShards(str(out), 8, captions="json.file_name")
    for i in range(9):
        name = every[i]["txt"]
        content = every._read(every._place(i)[0], every._opened(every._place(i)[0]).images[every._place(i)[1]])
        assert content == (folder / name).read_bytes()
    with tarfile.open(out / "00000.tar") as tar:
        members = {name: tar.extractfile(name).read() for name in tar.getnames()}
    assert set(members) >= {"000000000.png", "000000000.txt", "000000000.json"}
    fields = json.loads(members["000000000.json"])
    assert fields.keys() >= {"file_name", "width", "height", "score", "note"} and isinstance(fields["score"], float)
    assert fields["id"] == f"00{fields['file_name'][0]}"
    several = ImageShards(str(out), 8, captions="json.captions")  # of one or more for each image
    captions = {i: {several[i]["txt"] for _ in range(30)} for i in range(9)}
    assert sorted(map(len, captions.values())) == [1] * 8 + [2] and {"caption 0", "another"} in captions.values()


@pytest.mark.parametrize(
    ("cell", "field"),
    [
        ("12", 12), ("-3.50", -3.5), (" .5 ", 0.5), ("1e3", 1000.0), ("0", 0), ("007", "007"), ("1_000", "1_000"),
        ("nan", "nan"), ("Infinity", "Infinity"), ("1e999", "1e999"), ("", ""), ("9" * 5000, "9" * 5000),
        ("9" * 400, int("9" * 400)), ([float("nan"), "007"], [None, "007"]), (float("inf"), None), (None, None),
    ],
)  # fmt: skip
def test_a_field_is_a_number_only_if_its_text_is_that_number_and_json_can_hold_it(cell, field):
    assert shard_writer._plain(cell) == field and type(shard_writer._plain(cell)) is type(field)


def test_a_killed_run_continues_and_ends_with_the_same_bytes(folder, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    write_shards(selection(folder), whole, Layout(samples=3), workers=1)
    sample, left = shard_writer._sample, [5]

    def dies(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return sample(*args)

    monkeypatch.setattr(shard_writer, "_sample", dies)
    with pytest.raises(KeyboardInterrupt):
        write_shards(selection(folder), parts, Layout(samples=3), workers=1)
    assert sorted(path.name for path in parts.glob("*.tar")) == ["00000.tar"]
    monkeypatch.setattr(shard_writer, "_sample", sample)
    done = write_shards(selection(folder), parts, Layout(samples=3), workers=2)
    assert done.written == 3 and done.shards == 4 and done.skipped == {"empty file": 1}
    (parts / "00001_stats.json").unlink()
    assert write_shards(selection(folder), parts, Layout(samples=3), workers=1).written == 1
    assert files(whole) == files(parts) and len(list(parts.glob("*.npz"))) == 4
    assert not list(parts.glob(".*"))


def test_another_selection_or_layout_does_not_mix_with_existing_shards(folder, tmp_path):
    write_shards(selection(folder), tmp_path / "out", Layout(samples=5), workers=1)
    with pytest.raises(ValueError, match=r"holds other shards \(--samples 5 there, 4 here\): choose another folder"):
        write_shards(selection(folder), tmp_path / "out", Layout(samples=4), workers=1)
    with pytest.raises(ValueError, match=r"holds other shards \(--min_size 2 there, 9 here\): choose another folder"):
        write_shards(selection(folder, min_size=9), tmp_path / "out", Layout(samples=5), workers=1)
    table = folder / "captions.csv"
    text = table.read_text()
    table.write_text(text.replace(",n5,", ",other,"))
    with pytest.raises(ValueError, match=r"holds other shards \(another fields\): choose another folder"):
        write_shards(selection(folder), tmp_path / "out", Layout(samples=5), workers=1)
    table.write_text(text)
    save_image(folder / "9.png", 9, 20, 20)
    with pytest.raises(ValueError, match=r"holds other shards \(another content\): choose another folder"):
        write_shards(selection(folder), tmp_path / "out", Layout(samples=5), workers=1)
    (folder / "9.png").unlink()
    with pytest.raises(
        ValueError, match=r"holds other shards \(\d+ images there, \d+ here; another files; another labels"
    ):
        write_shards(selection(folder), tmp_path / "out", Layout(samples=5), workers=1)
    (tmp_path / "out/shards.json").unlink()
    with pytest.raises(ValueError, match=r"holds 00000.tar, but no shards.json"):
        write_shards(selection(folder), tmp_path / "out", Layout(samples=5), workers=1)


def test_an_unusable_image_stops_the_writer_if_asked_to(folder, tmp_path):
    with pytest.raises(BadImageError, match=r"3.png: empty file"):
        write_shards(selection(folder, on_error="raise"), tmp_path / "out", Layout(samples=1), workers=2)
    assert threading.active_count() < 10


def test_larger_images_are_scaled_and_smaller_ones_stay_as_they_are(folder, tmp_path):
    done = write_shards(selection(folder), tmp_path / "out", Layout(size=10), workers=1)
    assert done.sides == (8, 10, 10)
    data = ImageShards(str(tmp_path / "out"), 8, captions="json.file_name")
    sizes = {data[i]["txt"]: tuple(data.sizes[i]) for i in range(9)}
    assert sizes["9.png"] == (10, 14) and sizes["1.png"] == (12, 9) and load_image(folder / "1.png").size == (12, 9)
    index = data.store.index(data.shards[0])
    assert set(index.members) == {"png", "jpg", "txt", "json"} and "original_height" in index.numbers


def test_names_that_are_not_utf8_and_sides_beyond_jpeg_are_handled(tmp_path):
    save_image(tmp_path / "images/caf\udce9.png")
    Image.new("1", (69_000, 20)).save(tmp_path / "images/wide.png")
    done = write_shards(
        Selection(str(tmp_path / "images"), on_error="skip"), tmp_path / "out", Layout(size=19), workers=1
    )
    assert done.samples == 1 and done.skipped == {"65550x19 pixels once scaled, a JPEG has at most 65,500": 1}
