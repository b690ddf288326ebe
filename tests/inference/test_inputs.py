"""Files and words on the scripts' command lines."""

import numpy as np
import pytest
from PIL import Image

from ldm.inference.inputs import (
    check_image,
    check_pairs,
    find_depth,
    find_pairs,
    load_mask,
    make_hints,
    parse_classes,
    read_prompts,
)
from ldm.inference.requests import ControlRequest


def test_prompt_files_are_lines_of_utf8_with_or_without_a_mark(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa café\r\n\r\n日本\n".encode())
    assert read_prompts(file) == ["a café", "", "日本"]


def test_only_line_ends_split_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("a\u2028b\x85c\x0cd\x0be\x1cf\rsecond\r\nthird".encode())
    assert read_prompts(file) == ["a\u2028b\x85c\x0cd\x0be\x1cf", "second", "third"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_prompt_files_with_a_byte_order_mark_are_read(tmp_path, encoding):
    (tmp_path / "prompts.txt").write_bytes("a café\n日本\n".encode(encoding))
    assert read_prompts(tmp_path / "prompts.txt") == ["a café", "日本"]


def test_empty_prompts_in_a_file_are_one_warning(tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("a\n\nb\n \n")
    read_prompts(tmp_path / "prompts.txt")
    (record,) = caplog.records
    assert "2 of 4 prompts are empty, the first in line 2" in record.message


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "no prompt in it"),
        (b"\n \n", "no prompt in it"),
        (b"caf\xe9\n", "UTF-8"),
        ("a".encode("utf-16-le"), "UTF-8"),
        (None, "No such file"),
    ],
)
def test_unreadable_prompt_files_are_refused_by_name(tmp_path, content, words):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read_prompts(file)
    assert str(file) in str(error.value)
    with pytest.raises(ValueError, match="directory"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    "words, classes", [(["207"], (207,)), (["1,2", "10-12"], (1, 2, 10, 11, 12)), (["3", "3-3"], (3, 3))]
)
def test_classes_are_numbers_lists_and_ranges(words, classes):
    assert parse_classes(words) == classes


def test_classes_are_named_too_and_a_word_that_could_be_both_is_a_number():
    names = ["2", "a cat", "dog, wet", "1-2"]
    assert parse_classes(["a cat,2", "dog, wet", "0-1"], names) == (1, 2, 2, 0, 1)
    with pytest.raises(ValueError, match=r"--classes 'a cot': neither a number nor .*; did you mean 'a cat'\?"):
        parse_classes(["a cot"], names)


@pytest.mark.parametrize("word", ["cat", "", "1,", "-1", "1-", "5-3", "1.5", "²", "0-999999999999"])
def test_an_invalid_class_is_refused_by_name(word):
    with pytest.raises(ValueError, match="--classes"):
        parse_classes([word])


def test_a_mask_finds_its_image_with_any_extension(tmp_path):
    for name in ("b.jpg", "b_mask.png", "a.png", "a.jpg", "a_mask.png", "c.png"):
        (tmp_path / name).touch()
    assert [(p.name, m.name) for p, m in find_pairs(tmp_path)] == [
        ("a.png", "a_mask.png"),
        ("b.jpg", "b_mask.png"),
    ]


# --- masks and images


def spot(inside, outside, dtype=np.uint8, shape=()) -> np.ndarray:
    """(8, 8, *shape) with a hole of 2x3 pixels."""
    levels = np.full((8, 8, *shape), outside, dtype=dtype)
    levels[2:4, 3:6] = inside
    return levels


@pytest.mark.parametrize(
    "levels",
    [
        spot(255, 0),
        spot(1, 0),
        spot(True, False, bool),
        spot(128, 127),
        spot(65535, 0, np.uint16),
        spot(255, 0, np.uint16),
        spot(1, 0, np.uint16),
        spot(1.0, 0.0, np.float32),
        spot(255.0, 0.0, np.float32),
        spot([255, 255, 255], [0, 0, 0], shape=(3,)),
        spot([255, 255, 255, 255], [255, 255, 255, 0], shape=(4,)),  # white on transparent
        spot([255, 255, 255, 255], [0, 0, 0, 0], shape=(4,)),
    ],
    ids=str,
)
def test_every_form_of_a_mask_means_the_same_hole(tmp_path, levels):
    Image.fromarray(levels).save(tmp_path / "m.tif")
    assert np.array_equal(np.asarray(load_mask(tmp_path / "m.tif")), spot(255, 0))


@pytest.mark.parametrize(
    ("levels", "highest"),
    [
        (spot(0, 0), "0"),
        (spot(127, 0), "127"),
        (spot(2, 0), "2"),
        (spot([0, 0, 0, 0], [0, 0, 0, 255], shape=(4,)), "0"),  # a transparent hole in black
        (spot([0, 0, 0, 255], [0, 0, 0, 0], shape=(4,)), "0"),  # alpha alone
        (spot([255, 255, 255, 0], [0, 0, 0, 255], shape=(4,)), "0"),
    ],
    ids=str,
)
def test_a_mask_that_would_leave_the_image_as_it_is_is_refused_with_its_largest_value(tmp_path, levels, highest):
    Image.fromarray(levels).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=rf"m.png: its largest value is {highest}, so nothing would be") as caught:
        load_mask(tmp_path / "m.png")
    assert ("transparent" in str(caught.value)) == (levels.shape[2:] == (4,))


def test_suspicious_masks_are_one_warning_of_each_kind(tmp_path, caplog):
    photo = np.random.default_rng(0).integers(60, 150, (8, 8), dtype=np.uint8)
    for k, levels in enumerate((spot(0, 255), spot(255, 255), spot(1, 0), spot(255, 0), photo)):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{k}.png")
        Image.fromarray(levels).save(tmp_path / f"{k}_mask.png")
    check_pairs(find_pairs(tmp_path))
    inverted, grey, binary = (record.message for record in caplog.records)
    assert "2 of 5 masks are mostly white (91% of" in inverted and "0_mask.png" in inverted
    assert "1 of 5 masks are mostly grey" in grey and "4_mask.png" in grey
    assert "1 of 5 masks have only the values 0 and 1" in binary and "2_mask.png" in binary


def test_images_without_a_mask_are_one_warning(tmp_path, caplog):
    for name in ("a.png", "a_mask.png", "b.png", "b_mask.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert len(find_pairs(tmp_path)) == 1
    (record,) = caplog.records
    assert "2 images without an x_mask.png are skipped, e.g. b.png" in record.message


def test_a_mask_of_another_size_is_refused_and_a_rotated_one_explained(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 16)).save(tmp_path / "x.png", exif=exif)  # upright it is 16x8
    Image.new("L", (8, 16), 255).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"m.png has 8x16 pixels, .*x.png has 16x8: sizes must match \(is only one"):
        check_pairs([(tmp_path / "x.png", tmp_path / "m.png")])


@pytest.mark.parametrize(("size", "near"), [((1, 1), "8x8"), ((3, 100), "8x96"), ((21, 3), "24x8")])
def test_tiny_images_are_refused_with_the_nearest_size(tmp_path, size, near):
    Image.new("RGB", size).save(tmp_path / "x.png")
    sizes = rf"x.png: {size[0]}x{size[1]} pixels; this model needs at least 4x4, .*: {near} is the nearest"
    with pytest.raises(ValueError, match=sizes):
        check_image(tmp_path / "x.png", "--init-img", 8)


def test_animations_and_transparent_images_are_warned_about(tmp_path, caplog):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (8, 8), "white").save(tmp_path / "white.png")
    for name in ("a.gif", "clear.png", "white.png"):
        check_image(tmp_path / name, "--init-img")
    animation, transparent = (record.message for record in caplog.records)
    assert "a.gif: an animation of 3 frames" in animation and "clear.png: fully transparent" in transparent


def test_depth_maps_of_other_proportions_or_of_one_value_are_warned_about_and_nan_is_refused(tmp_path, caplog):
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "d.png")
    find_depth(str(tmp_path / "d.png"), (16, 8))
    assert [word in record.message for word, record in zip(("stretched", "is 7 everywhere"), caplog.records)] == [
        True
    ] * 2
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "d.tif")
    with pytest.raises(ValueError, match=r"d.tif: some values are not finite"):
        find_depth(str(tmp_path / "d.tif"), (8, 8))


def control_request(detector):
    return ControlRequest(controls=1, detector=(detector,), height=32, width=32)


def test_hints_that_control_nothing_are_warned_of_and_those_of_0_and_1_refused(caplog):
    edges = Image.new("RGB", (32, 32))
    edges.paste((255, 255, 255), (8, 8, 24, 24))
    for detector in ("none", "canny"):
        make_hints([edges], control_request(detector), None)
    assert not caplog.text
    make_hints([Image.new("RGB", (32, 32))], control_request("none"), None)
    assert "a control image is 0 of 255 everywhere; the hint controls nothing" in caplog.text
    make_hints([Image.new("RGB", (32, 32), "white")], control_request("canny"), None)
    assert "canny found no edges (--canny 100 200: lower values find more); the hint" in caplog.text
    with pytest.raises(ValueError, match="its largest value is 1 of 255"):
        make_hints([edges.point(lambda level: level // 255)], control_request("none"), None)
