"""Images and their hints: the same view of both, from a folder, a table's column or a detector."""

import pickle

import numpy as np
import pytest
from PIL import Image

from ldm.data.base import DataConfigError
from ldm.data.control import ControlFolder, DigitEdges
from ldm.data.detectors import canny_edges
from ldm.data.image import BadImageError, from_array


@pytest.fixture
def folder(tmp_path):
    """Images whose hints are their negatives, in another format and at half their size for one of them."""
    random = np.random.RandomState(0)
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "hints" / "a").mkdir(parents=True)
    rows = ["file_name,text,edges"]
    for index, name in enumerate(("a/0", "a/1", "2")):
        levels = np.kron(random.randint(0, 256, (4, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)  # 32x48
        Image.fromarray(levels).save(tmp_path / "images" / f"{name}.png")
        hint = Image.fromarray(255 - levels)
        hint = hint.resize((24, 16), Image.Resampling.BOX) if index == 1 else hint
        hint.save(tmp_path / "hints" / f"{name}.bmp")
        hint.save(tmp_path / "images" / f"{name}-hint.bmp")
        rows.append(f"{name}.png,image {index},{name}-hint.bmp")
    (tmp_path / "images" / "table.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def sources(folder):
    table = {"captions": "table.csv", "hint_column": "edges"}
    images = {"captions": "table.csv", "hints": str(folder / "hints")}
    return [table, images]


@pytest.mark.parametrize("source", [0, 1], ids=["column", "folder"])
def test_a_hint_has_the_crop_and_the_flip_of_its_image(folder, source):
    options = {"size": 32, "random_crop": True, "flip_p": 0.5, "interpolation": "nearest"}
    data = ControlFolder(str(folder / "images"), **options, **sources(folder)[source])
    assert [item.name for item in data.items] == ["a/0.png", "a/1.png", "2.png"]
    assert data[0]["caption"] == "image 0"
    for _ in range(8):
        for sample in (data[0], data[1], data[2]):
            assert sample["hint"].shape == (32, 32, 3) and sample["hint"].dtype == np.float32
            np.testing.assert_allclose(sample["hint"], (1 - sample["image"]) / 2, atol=1e-6)


def test_a_detector_makes_the_hint_of_the_cropped_image_in_spawned_workers_too(folder):
    data = ControlFolder(str(folder / "images"), size=32, random_crop=True, detector="canny", hint_key="control")
    data = pickle.loads(pickle.dumps(data))
    for sample in data:
        edges = canny_edges(from_array(sample["image"]))
        assert np.array_equal(sample["control"], np.asarray(edges) / np.float32(255))
    assert any(sample["control"].any() for sample in data)


@pytest.mark.parametrize("source", [0, 1], ids=["column", "folder"])
def test_a_missing_hint_is_an_error_or_leaves_its_image_out(folder, source):
    (folder / "hints" / "2.bmp").unlink()
    (folder / "images" / "2-hint.bmp").unlink()
    with pytest.raises(DataConfigError, match=r"2\.png: .*hint"):
        ControlFolder(str(folder / "images"), size=32, **sources(folder)[source])
    data = ControlFolder(str(folder / "images"), size=32, on_error="skip", **sources(folder)[source])
    assert [item.name for item in data.items] == ["a/0.png", "a/1.png"] and "hint" in str(data.skipped)


def test_a_table_that_pairs_no_or_two_hints_is_refused_in_the_words_of_hints(folder):
    with pytest.raises(
        DataConfigError, match=r"hint_column 'edge': .* has only the columns 'file_name', 'text', 'edges'"
    ):
        ControlFolder(str(folder / "images"), size=32, captions="table.csv", hint_column="edge")
    with (folder / "images" / "table.csv").open("a") as table:
        table.write("2.png,again,a/0-hint.bmp\n")
    with pytest.raises(DataConfigError, match=r"line 5: 2\.png is paired with another image in an earlier line"):
        ControlFolder(str(folder / "images"), size=32, **sources(folder)[0])


def test_a_hint_of_other_proportions_is_unusable(folder):
    Image.new("RGB", (32, 32)).save(folder / "hints" / "2.bmp")
    data = ControlFolder(str(folder / "images"), size=32, **sources(folder)[1])
    with pytest.raises(ValueError, match=r"2\.bmp.*is 32x32, but its image is 48x32"):
        data[2]
    data = ControlFolder(str(folder / "images"), size=32, on_error="skip", **sources(folder)[1])
    assert len(data) == 2


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "nothing says where the hints are"),
        ({"detector": "canny", "hints": "x"}, "hints and detector exclude each other"),
        ({"detector": "sobel"}, "set detector to one of none, canny, depth"),
        ({"detector": "canny", "canny": (200, 100)}, "expected 0 <= low <= high"),
        ({"detector": "depth", "canny": (1, 2)}, r"canny \[1, 2\]: is for detector canny, but detector is depth"),
        ({"hints": "x", "depth_weights": "y"}, "depth_weights 'y': is for detector depth, but detector is none"),
        ({"detector": "depth"}, "depth_weights None: has no config.json"),
        ({"hint_column": "edges"}, "there is no table with this column"),
        ({"hints": "/no/such/folder"}, "hints '/no/such/folder': no such folder"),
    ],
)
def test_what_says_where_hints_are_is_checked(folder, options, problem):
    with pytest.raises(DataConfigError, match=problem):
        ControlFolder(str(folder / "images"), size=32, **options)


def test_of_hints_of_one_name_that_with_the_suffix_of_the_image_is_its_own_else_none(folder):
    options = {"captions": "table.csv", "hints": str(folder / "hints"), "size": 16}
    Image.new("RGB", (48, 32), "blue").save(folder / "hints" / "2.png")
    data = ControlFolder(str(folder / "images"), **options)
    assert data[2]["hint"].reshape(-1, 3).tolist() == [[0, 0, 1]] * 256
    (folder / "hints" / "2.png").rename(folder / "hints" / "2.webp")
    with pytest.raises(DataConfigError, match=r"2.png: has several hints: .*2.bmp, .*2.webp"):
        ControlFolder(str(folder / "images"), **options)


@pytest.mark.parametrize("hints", [".", "hints"])
def test_hints_among_the_images_are_refused(tmp_path, hints):
    (tmp_path / "hints").mkdir()
    for name in ("a.png", "hints/a.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    with pytest.raises(DataConfigError, match=r"is in the folder of the images, so that the hint .*a.png is an image"):
        ControlFolder(str(tmp_path), hints=str(tmp_path / hints))


def test_hints_with_1_for_white_are_unusable(folder):
    levels = np.random.default_rng(0).integers(0, 2, (32, 48), dtype=np.uint8)
    Image.fromarray(levels).save(folder / "hints" / "2.bmp")
    options = {"captions": "table.csv", "hints": str(folder / "hints"), "size": 16}
    with pytest.raises(BadImageError, match=r"2.bmp: its largest value is 1 of 255"):
        ControlFolder(str(folder / "images"), **options)[2]
    assert list(ControlFolder(str(folder / "images"), on_error="skip", **options).skipped) == ["2.png"]


def test_a_change_of_the_hints_changes_the_fingerprint(folder):
    options = {"captions": "table.csv", "hints": str(folder / "hints")}
    before = ControlFolder(str(folder / "images"), **options).fingerprint
    assert ControlFolder(str(folder / "images"), **options).fingerprint == before
    hint = (folder / "hints" / "2.bmp").read_bytes()
    (folder / "hints" / "2.bmp").write_bytes(hint[:-1] + b"\1")
    changed = ControlFolder(str(folder / "images"), **options).fingerprint
    assert {key for key in before if before[key] != changed[key]} == {"content"}
    (folder / "hints" / "2.bmp").rename(folder / "hints" / "2.png")
    after = ControlFolder(str(folder / "images"), **options).fingerprint
    assert after["labels"] != before["labels"] and after["files"] == before["files"]


def test_edges_of_digits_are_those_of_their_images():
    data = DigitEdges("held_out")
    sample = data[3]
    assert sample["hint"].shape == (32, 32, 3) and set(np.unique(sample["hint"])) == {0.0, 1.0}
    assert np.array_equal(sample["hint"], np.asarray(canny_edges(from_array(sample["image"]))) / np.float32(255))
    assert 0.05 < data.hints.mean() < 0.5 and (data.hints.mean(axis=(1, 2, 3)) > 0.02).all()
