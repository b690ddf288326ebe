"""Triples of an image, an instruction and the edited image."""

import json
import random

import numpy as np
import pytest
from torch.utils.data import default_collate

from ldm.data.base import DataConfigError
from ldm.data.edits import EditDataset, EditFolder
from ldm.data.image import BadImageError
from ldm.util import get_obj_from_str
from tests.data.layouts import pixels, save_image

CSV = "before,instruction,after\na.png,make it winter,b.png\na.png,make it night,c.png\n"
OTHER_COLUMNS = {"image_column": "x", "caption_column": "y", "before_column": "z"}


@pytest.fixture
def folder(tmp_path):
    """The edited image of a.png is its negative, so that a different crop or flip shows."""
    from PIL import Image, ImageOps

    save_image(tmp_path / "a.png", 0)
    for name in "bc":
        ImageOps.invert(Image.open(tmp_path / "a.png")).save(tmp_path / f"{name}.png")
    (tmp_path / "triples.csv").write_text(CSV)
    return tmp_path


def test_an_item_holds_both_images_under_one_crop_and_flip_and_the_instruction(folder):
    random.seed(0)
    dataset = EditFolder(str(folder), size=16, random_crop=True, flip_p=0.5, interpolation="nearest")
    first = [dataset[0] for _ in range(6)]
    for sample in first:
        assert sample["edited"].shape == (16, 16, 3) and sample["edited"].dtype == np.float32
        np.testing.assert_allclose(sample["edit"]["c_concat"], -sample["edited"], atol=1e-6)
    assert len({sample["edited"].tobytes() for sample in first}) > 1
    assert [dataset[k]["edit"]["c_crossattn"] for k in range(2)] == ["make it winter", "make it night"]
    batch = default_collate([dataset[0], dataset[1]])
    assert batch["edit"]["c_concat"].shape == (2, 16, 16, 3)
    assert batch["edit"]["c_crossattn"] == ["make it winter", "make it night"]


@pytest.mark.parametrize(
    "table, content, options",
    [
        ("t.tsv", "input_image\tedit_prompt\tedited_image\na.png\tmake it winter\tb.png\n", {}),
        ("t.jsonl", json.dumps({"before": "a.png", "edit": ["make it winter"], "edited": "b.png"}), {}),
        ("t.csv", "x,y,z\nb.png,make it winter,a.png\n", OTHER_COLUMNS),
    ],
)
def test_tables_of_other_formats_and_column_names_are_read(folder, table, content, options):
    (folder / table).write_text(content)
    dataset = EditFolder(str(folder), triples=table, size=24, **options)
    sample = dataset[0]
    assert len(dataset) == 1 and sample["edit"]["c_crossattn"] == "make it winter"
    assert sample["file_path_"].endswith("b.png") and dataset.paired == {"b.png": "a.png"}


def test_images_are_found_below_the_folder_of_their_split(folder):
    for split in ("train", "val"):
        (folder / split).mkdir()
        for name in "abc":
            save_image(folder / split / f"{name}.png", 1)
    (folder / "triples.csv").write_text(CSV.replace("a.png", "train/a.png").replace("b.png", "train/b.png"))
    dataset = EditFolder(str(folder), size=16, split="train")
    assert [item.name for item in dataset.items] == ["b.png", "c.png"]
    assert dataset[0]["edit"]["c_concat"].shape == (16, 16, 3)


@pytest.mark.parametrize(
    "content, words",
    [
        ("instruction,after\nx,b.png\n", "before_column None: .* has only the columns 'instruction', 'after'"),
        ("before,after\na.png,b.png\n", "caption_column None: .* has only the columns"),
        ("before,instruction,after\nz.png,x,b.png\n", r"b.png: no such file: .*z.png, its image before"),
        ("before,instruction,after\n../z.png,x,b.png\n", r"line 2: the path '../z.png' leaves the root"),
        ("before,instruction,after\ntriples.csv,x,b.png\n", "line 2: 'triples.csv' is not an image"),
        ("before,instruction,after\n,x,b.png\n", "line 2: column 'before' has no file name"),
        (CSV + "c.png,make it night,b.png\n", "line 4: b.png is paired with another image in an earlier line"),
    ],
)
def test_a_broken_table_is_refused_with_its_line(folder, content, words):
    (folder / "triples.csv").write_text(content)
    with pytest.raises(DataConfigError, match=words):
        EditFolder(str(folder), size=16)
    if "line" in words or "no such file" in words:
        (folder / "triples.csv").write_text(content + "a.png,make it day,c.png\n")
        skipping = EditFolder(str(folder), size=16, on_error="skip")
        assert "make it day" in [caption for item in skipping.items for caption in item.captions] and skipping.skipped


def test_another_image_before_changes_the_fingerprint(folder):
    before = EditFolder(str(folder), size=16).fingerprint
    text = (folder / "triples.csv").read_text()
    (folder / "triples.csv").write_text(text.replace("a.png,", "c.png,"))
    assert text != (folder / "triples.csv").read_text()
    after = EditFolder(str(folder), size=16).fingerprint
    assert after["labels"] != before["labels"] and after["files"] == before["files"]
    (folder / "c.png").write_bytes((folder / "c.png").read_bytes() + b"\0")
    changed = EditFolder(str(folder), size=16).fingerprint
    assert {key for key in after if after[key] != changed[key]} == {"content"}


def test_images_of_other_proportions_are_unusable(folder):
    save_image(folder / "a.png", 0, 24, 24)
    with pytest.raises(BadImageError, match=r"a\.png: is 24x24, but its image is 32x24"):
        EditFolder(str(folder), size=16)[0]
    with pytest.raises(DataConfigError, match="2 skipped"):
        EditFolder(str(folder), size=16, on_error="skip")
    with pytest.raises(DataConfigError, match=r"triples 'gone\.csv': no such file"):
        EditFolder(str(folder), triples="gone.csv")
    with pytest.raises(DataConfigError, match="captions 'sidecar': triples do not take it"):
        EditFolder(str(folder), captions="sidecar")


def test_the_published_layout_is_read_by_the_published_name(tmp_path):
    (tmp_path / "seeds.json").write_text(json.dumps([[f"{k:04}", ["7", "8"]] for k in range(20)]))
    for k in range(20):
        for seed, part in ((7, 0), (7, 1), (8, 0), (8, 1)):
            save_image(tmp_path / f"{k:04}" / f"{seed}_{part}.jpg", k, 20, 20)
        (tmp_path / f"{k:04}" / "prompt.json").write_text(json.dumps({"edit": f"edit {k}", "input": "", "output": ""}))
    cls = get_obj_from_str("edit_dataset.EditDataset")
    assert cls is EditDataset
    sizes = {"min_resize_res": 16, "max_resize_res": 20, "crop_res": 16}
    splits = [cls(str(tmp_path), split, flip_prob=0.5, **sizes) for split in ("train", "val", "test")]
    assert [len(each) for each in splits] == [18, 1, 1]
    sample = splits[1][0]
    assert sample["edit"]["c_crossattn"] == "edit 18" and sample["edited"].shape == (16, 16, 3)
    np.testing.assert_array_equal(sample["edited"], sample["edit"]["c_concat"])  # one crop and flip: they are one image
    with pytest.raises(DataConfigError, match="crop_res 32: expected crop_res <= min_resize_res"):
        cls(str(tmp_path), crop_res=32, min_resize_res=16, max_resize_res=20)
    with pytest.raises(DataConfigError, match=r"splits .*: expected three shares"):
        cls(str(tmp_path), splits=[0.5, 0.1])
    (tmp_path / "seeds.json").unlink()
    with pytest.raises(DataConfigError, match=r"path .*seeds.json.*: .*No such file"):
        cls(str(tmp_path), **sizes)


def test_the_pixels_are_those_of_the_files(folder):
    sample = EditFolder(str(folder), size=24)[0]
    expected = pixels(0)[:, 4:28].astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(sample["edit"]["c_concat"], expected, atol=1e-6)
