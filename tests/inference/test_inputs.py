"""Files and words on the scripts' command lines."""

import pytest

from ldm.inference.inputs import find_pairs, parse_classes, read_prompts


def test_prompt_files_are_lines_of_utf8_with_or_without_a_mark(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa café\r\n\r\n日本\n".encode())
    assert read_prompts(file) == ["a café", "", "日本"]


@pytest.mark.parametrize("content, words", [(b"", "empty"), (b"caf\xe9\n", "UTF-8"), (None, "No such file")])
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


@pytest.mark.parametrize("word", ["cat", "", "1,", "-1", "1-", "5-3", "1.5", "²"])
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
