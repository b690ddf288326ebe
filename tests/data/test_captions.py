"""Captions: every file format, encoding and policy."""

import logging
import re

import pytest

from ldm.data.base import DataConfigError
from ldm.data.captions import CaptionPolicy, PromptTemplates, read_sidecar, read_table


def table(tmp_path, name, content, **columns):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_table(path, columns.get("image"), columns.get("caption"), columns.get("encoding", "utf-8")))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.csv", 'file_name,text\na.png,"a cat, asleep"\r\n\nb.png,een 🐈\n'),
        ("c.tsv", "file_name\ttext\na.png\ta cat, asleep\nb.png\teen 🐈\n"),
        ("c.jsonl", '{"file_name": "a.png", "text": "a cat, asleep"}\n\n{"file_name": "b.png", "text": "een 🐈"}\n'),
    ],
)
def test_tables_read_alike_with_and_without_byte_order_mark(tmp_path, name, content, encoding):
    rows = table(tmp_path, name, content.encode(encoding))
    assert [(row.image, row.captions, row.problem) for row in rows] == [
        ("a.png", ["a cat, asleep"], ""),
        ("b.png", ["een 🐈"], ""),
    ]


def test_columns_have_usual_names_and_can_be_named(tmp_path):
    assert table(tmp_path, "c.csv", "prompt,image\nx,a.png\n")[0][1:3] == ("a.png", ["x"])
    assert table(tmp_path, "c.csv", "was,wo,text\nx,a.png,no\n", image="wo", caption="was")[0][1:3] == ("a.png", ["x"])


def test_a_missing_column_is_an_error_with_the_columns_there_are(tmp_path):
    with pytest.raises(
        DataConfigError, match=r"caption_column None: .*c.csv has only the columns 'image', 'beschrijving'; set capt"
    ):
        table(tmp_path, "c.csv", "image,beschrijving\na.png,x\n")
    with pytest.raises(DataConfigError, match=r"image_column 'pic': .* 'image', 'text'"):
        table(tmp_path, "c.jsonl", '{"image": "a", "text": "b"}', image="pic")


def test_json_captions_may_be_lists_and_blank_ones_do_not_count(tmp_path):
    rows = table(
        tmp_path,
        "c.jsonl",
        '{"image": "a", "text": ["x", " ", "y "]}\n{"image": "b", "text": null}\n{"image": "c", "text": " "}',
    )
    assert [row.captions for row in rows] == [["x", "y"], [], []]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("c.csv", "image,text\na.png,one, two\nb.png,x\n", "3 columns, but the header has 2"),
        ("c.csv", 'image,text\na.png,"open "quote" x"\nb.png,x\n', "expected after"),
        ("c.csv", "image,text\n,one\nb.png,x\n", "has no file name"),
        ("c.jsonl", '{"image": "a", "text"\n{"image": "b.png", "text": "x"}', "invalid JSON"),
        ("c.jsonl", '[1]\n{"image": "b.png", "text": "x"}', "holds list, expected an object"),
        ("c.jsonl", '{"image": "a", "text": 5}\n{"image": "b.png", "text": "x"}', "holds int, expected text"),
        ("c.jsonl", '{"image": 5, "text": "x"}\n{"image": "b.png", "text": "x"}', "has no file name"),
        ("c.csv", b"image,text\na.png,caf\xe9\nb.png,x\n", "not utf-8 (byte 0xe9)"),
        ("c.jsonl", b'{"image": "a.png", "text": "caf\xe9"}\n{"image": "b.png", "text": "x"}', "not utf-8 (byte 0xe9)"),
    ],
)
def test_a_bad_record_has_its_problem_and_does_not_hide_the_next(tmp_path, name, content, problem):
    bad, good = table(tmp_path, name, content)
    assert problem in bad.problem and bad.line == (2 if name == "c.csv" else 1)
    assert (good.image, good.captions, good.problem) == ("b.png", ["x"], "")


def test_an_encoding_can_be_named(tmp_path):
    assert table(tmp_path, "c.csv", b"image,text\na.png,caf\xe9\n", encoding="latin-1")[0].captions == ["café"]
    with pytest.raises(DataConfigError, match="caption_encoding 'utf-99': unknown encoding"):
        table(tmp_path, "c.csv", "image,text\n", encoding="utf-99")


def test_each_line_of_a_sidecar_is_a_caption(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  the same 🐈 cat \n".encode())
    assert read_sidecar(path) == ["a cat", "the same 🐈 cat"]
    path.write_bytes("a\u2028cat\ra\x85dog\r\n\x0ca\x0cbird\x0c".encode())
    assert read_sidecar(path) == ["a\u2028cat", "a\x85dog", "a\x0cbird"]
    path.write_bytes(b"")
    assert read_sidecar(path) == []
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"not utf-8 \(byte 0xe9\); set caption_encoding"):
        read_sidecar(path)
    assert read_sidecar(path, "cp1252") == ["café"]


def test_a_caption_larger_than_csv_allows_by_default_is_read(tmp_path):
    assert len(table(tmp_path, "c.csv", f"image,text\na.png,{'x' * 200_000}\n")[0].captions[0]) == 200_000


def test_missing_captions_follow_the_policy():
    with pytest.raises(
        DataConfigError, match=r"a.png has no caption .why.; add one, or set missing_caption to skip or empty"
    ):
        CaptionPolicy().apply("a.png", [], "why")
    assert CaptionPolicy("skip").apply("a.png", [], "why") == ((), "no caption")
    assert CaptionPolicy("empty").apply("a.png", [], "why") == (("",), "")


def test_long_captions_follow_the_policy_and_what_is_dropped_is_logged_once(caplog):
    long = "x" * 10 + "dropped"
    with pytest.raises(DataConfigError, match=r"a.png has a caption of 17 characters, more than max_caption_chars 10"):
        CaptionPolicy(max_chars=10, long="raise").apply("a.png", [long], "")
    assert CaptionPolicy(max_chars=10, long="skip").apply("a.png", ["ok", long], "")[0] == ()
    policy = CaptionPolicy(max_chars=10)
    with caplog.at_level(logging.WARNING):
        assert policy.apply("a.png", ["ok", long], "") == (("ok", "x" * 10), "")
        assert policy.apply("b.png", [long], "") == (("x" * 10,), "")
    assert (
        len(caplog.records) == 1 and caplog.messages[0].endswith("dropped: dropped") and "a.png" in caplog.messages[0]
    )


@pytest.mark.parametrize(
    ("templates", "subject", "caption", "expected"),
    [
        ((), None, "a red cat", {"a red cat"}),
        ((), "a <me> cat", "a red cat", {"a <me> cat"}),
        (("a photo of {}", "{}, painted"), None, "a red cat", {"a photo of a red cat", "a red cat, painted"}),
        (("a photo of {}", "{} and {}"), "<me>", "a red cat", {"a photo of <me>", "<me> and <me>"}),
    ],
)
def test_templates_name_the_subject_or_else_the_caption(templates, subject, caption, expected):
    prompts = PromptTemplates(templates, subject, captioned=True)
    assert {prompts(caption) for _ in range(50)} == expected
    assert bool(prompts) == (expected != {"a red cat"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            (["a {}", "a photo"], "x", True),
            "templates 'a photo': has no {}; put {} where the subject or caption belongs",
        ),
        ((["a {}"], None, False), "subject None: templates need words for {}; set subject, or captions"),
        (([], " ", True), "subject ' ': is blank; set subject to words or null"),
    ],
)
def test_invalid_templates_are_refused(options, message):
    with pytest.raises(DataConfigError, match=re.escape(message)):
        PromptTemplates(*options)
