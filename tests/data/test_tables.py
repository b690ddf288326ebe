"""Tables of captions: one set of rules for CSV, TSV and JSONL."""

import json
import unicodedata

import pytest

from ldm.data.base import DataConfigError
from ldm.data.folder import ImageFolder
from tests.data.layouts import save_image

COUNT = 12


@pytest.fixture
def root(tmp_path):
    for i in range(COUNT):
        save_image(tmp_path / f"{i:02}.png", i, 4, 4)
    return tmp_path


def write(root, name, rows, columns=("file_name", "text")):
    """Write (image, caption) rows; a str is a line as it is."""
    separator = "\t" if name.endswith(".tsv") else ","
    lines = [] if name.endswith(".jsonl") else [separator.join(columns)]
    for row in rows:
        fields = row if isinstance(row, tuple) else (row,)
        is_json = name.endswith(".jsonl") and isinstance(row, tuple)
        lines.append(json.dumps(dict(zip(columns, row))) if is_json else separator.join(fields))
    (root / name).write_text("\n".join(lines) + "\n")
    return name


def folder(root, table, on_error="raise", **options):
    return ImageFolder(str(root), size=4, captions=table, on_error=on_error, **options)


def rows():
    return [(f"{i:02}.png", f"caption {i}") for i in range(COUNT)]


@pytest.mark.parametrize("closed_later", [False, True])
@pytest.mark.parametrize("name", ["c.csv", "c.tsv"])
@pytest.mark.parametrize("quoted", [False, True])
def test_a_stray_quote_costs_its_own_row_and_is_named(root, name, closed_later, quoted):
    content = [(image, f'"{caption}"') for image, caption in rows()] if quoted else rows()
    content[3] = (content[3][0], '"an open quote')
    if closed_later:
        content[9] = (content[9][0], 'closed here"')
    write(root, name, content)
    dataset = folder(root, name, "skip")
    assert len(dataset) == COUNT - 1 and len(dataset.skipped) == 1 and f"{root / name} line 5" in dataset.skipped
    assert all(len(caption) < 15 and "\n" not in caption for item in dataset.items for caption in item.captions)
    with pytest.raises(DataConfigError, match=rf"{name} line 5: .*quote.*, or set on_error to skip"):
        folder(root, name)


def test_a_stray_quote_in_the_last_row_or_in_lines_that_are_no_records_is_named(root):
    for content in ([*rows()[:-1], ("11.png", '"open')], [*rows()[:-1], ("11.png", '"open\nsome text, more text')]):
        dataset = folder(root, write(root, "c.csv", content), "skip")
        assert len(dataset) == COUNT - 1 and "a quoted field is not closed" in next(iter(dataset.skipped.values()))


def test_a_quoted_caption_may_span_lines(root):
    content = [("00.png", '"first line\nsecond, line\n\nlast ""line"""'), *rows()[1:]]
    dataset = folder(root, write(root, "c.csv", content))
    assert dataset.items[0].captions == ('first line\nsecond, line\n\nlast "line"',) and len(dataset) == COUNT


@pytest.mark.parametrize("name", ["c.csv", "c.tsv", "c.jsonl"])
@pytest.mark.parametrize(
    ("image", "problem"),
    [
        ("../x.png", "leaves the root"),
        ("/etc/x.png", "leaves the root"),
        ("C:/x.png", "leaves the root"),
        ("a/../../x.png", "leaves the root"),
        ("none.png", "no such file"),
        ("notes.md", "is not an image"),
        ("", "has no file name"),
    ],
)
def test_rows_that_name_no_image_below_the_root_are_refused_or_counted(root, name, image, problem):
    save_image(root.parent / "x.png")
    (root / "notes.md").write_text("x")
    write(root, name, [*rows(), (image, "x")])
    with pytest.raises(DataConfigError, match=problem):
        folder(root, name)
    dataset = folder(root, name, "skip")
    assert len(dataset) == COUNT and [problem in reason for reason in dataset.skipped.values()] == [True]


@pytest.mark.parametrize("name", ["c.csv", "c.tsv", "c.jsonl"])
def test_spellings_of_one_file_are_one_image(root, name):
    save_image(root / "sub" / "cafe\u0301.png")  # decomposed, as macOS writes it
    spellings = ["./00.png", "00.png", ".//00.png", ".\\00.png"]
    write(root, name, [(image, f"{i}") for i, image in enumerate(spellings)])
    assert folder(root, name).items == [("00.png", ("0", "1", "2", "3"))]
    write(root, name, [("sub\\caf\u00e9.png", "a"), ("sub/cafe\u0301.png", "b"), ("sub/caf\u00e9.png", "a")])
    assert folder(root, name).items == [("sub/cafe\u0301.png", ("a", "b"))]


def names_of(dataset):
    return [item.name for item in dataset.items]


@pytest.mark.parametrize("name", ["c.csv", "c.tsv", "c.jsonl"])
def test_a_file_with_two_spellings_is_in_one_split(root, name):
    write(root, name, [(prefix + image, "x") for image, _ in rows() for prefix in ("", "./")])
    train, held_out = (names_of(folder(root, name, split=s, validation_fraction=0.5)) for s in ("train", "validation"))
    assert not set(train) & set(held_out) and len(train) + len(held_out) == COUNT


def test_a_column_that_is_named_twice_is_refused(root):
    (root / "c.csv").write_text("file_name,text,text\n00.png,a,b\n")
    with pytest.raises(DataConfigError, match=r"c.csv'?: has two columns 'text'; rename one of them"):
        folder(root, "c.csv")
    (root / "c.jsonl").write_text('{"file_name": "00.png", "text": "a", "text": "b"}\n')
    with pytest.raises(DataConfigError, match=r"line 1: invalid JSON .the key 'text' appears twice"):
        folder(root, "c.jsonl")


def test_the_case_of_a_column_does_not_matter_unless_it_decides(root):
    assert len(folder(root, write(root, "c.csv", rows(), ("File_Name", "TEXT")))) == COUNT
    (root / "c.csv").write_text("file_name,Text,TEXT\n00.png,a,b\n")
    with pytest.raises(DataConfigError, match=r"c.csv has the columns 'Text', 'TEXT'; set caption_column to one"):
        folder(root, "c.csv")
    assert folder(root, "c.csv", caption_column="TEXT").items == [("00.png", ("b",))]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["c.csv", "c.tsv", "c.jsonl"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_only_line_ends_end_a_line(root, name, end, mark):
    captions = [f"one{separator}two" for separator in ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e")]
    write(root, name, [(f"{i:02}.png", caption) for i, caption in enumerate(captions)])
    (root / name).write_bytes((mark + (root / name).read_text()).replace("\n", end).encode())
    assert [item.captions for item in folder(root, name).items] == [(caption,) for caption in captions]


def test_empty_cells_at_the_end_of_a_row_do_not_count(root):
    (root / "c.csv").write_text("file_name,text,,\n00.png,a,,\n01.png,b\n02.png,c,,,,\n03.png,d,x\n")
    assert names_of(folder(root, "c.csv", "skip")) == ["00.png", "01.png", "02.png"]


@pytest.mark.parametrize("line", ['{"file_name": "00.png", "text": NaN}', '{"file_name": "00.png", "text": "\\ud800"}'])
def test_json_that_is_no_text_is_refused(root, line):
    (root / "c.jsonl").write_text(line + "\n")
    with pytest.raises(DataConfigError, match=r"line 1: (invalid JSON .NaN is not|not text .a lone surrogate)"):
        folder(root, "c.jsonl")


@pytest.mark.parametrize("name", ["c.csv", "c.tsv", "c.jsonl"])
def test_a_table_above_the_split_folders_is_kept_by_split(tmp_path, name):
    files = ["train/a.png", "train/sub/b.png", "validation/c.png", "test/d.png"]
    for i, file in enumerate(files):
        save_image(tmp_path / file, i, 4, 4)
    write(tmp_path, name, [(file, file) for file in files])
    found = {split: folder(tmp_path, name, split=split).items for split in ("train", "validation", "test")}
    assert found == {
        "train": [("a.png", ("train/a.png",)), ("sub/b.png", ("train/sub/b.png",))],
        "validation": [("c.png", ("validation/c.png",))],
        "test": [("d.png", ("test/d.png",))],
    }
    (tmp_path / name).rename(tmp_path / "train" / name)
    write(tmp_path / "train", name, [("a.png", "x")])
    assert folder(tmp_path, name, split="train").items == [("a.png", ("x",))]


@pytest.mark.parametrize("name", ["c.csv", "c.tsv", "c.jsonl"])
def test_a_column_with_the_names_of_splits_decides(root, name):
    def split(i):
        return ("Train", "val", "TEST")[i % 3]

    columns = ("file_name", "text", "Split")
    write(root, name, [(image, text, split(i)) for i, (image, text) in enumerate(rows())], columns)
    for k, own in enumerate(("train", "validation", "test")):
        assert names_of(folder(root, name, split=own)) == [f"{i:02}.png" for i in range(k, COUNT, 3)]
    with pytest.raises(DataConfigError, match=r"split None: .* has the splits test, train, validation in its column"):
        folder(root, name)
    write(root, name, [(image, text, "test" if i < 6 else "train") for i, (image, text) in enumerate(rows())], columns)
    train, held_out = (names_of(folder(root, name, split=own)) for own in ("train", "validation"))
    assert sorted(train + held_out) == [f"{i:02}.png" for i in range(6, COUNT)] and len(held_out) == 1
    write(root, name, [(image, text, str(i % 5)) for i, (image, text) in enumerate(rows())], columns)
    assert len(folder(root, name)) == COUNT  # folds of a cross validation are no splits


def test_a_row_whose_split_contradicts_its_folder_is_broken(tmp_path):
    for name in ("train/a.png", "train/b.png", "validation/c.png"):
        save_image(tmp_path / name)
    rows = "train/a.png,one,train\ntrain/b.png,two,validation\nvalidation/c.png,three,validation\n"
    (tmp_path / "captions.csv").write_text("file_name,text,split\n" + rows)
    options = {"root": str(tmp_path), "size": 8, "captions": "captions.csv"}
    for split, kept in (("train", "a.png"), ("validation", "c.png")):
        with pytest.raises(DataConfigError, match=r"line 3: its column 'split' says validation, but train/b.png is in"):
            ImageFolder(**options, split=split)
        dataset = ImageFolder(**options, split=split, on_error="skip")
        assert [item.name for item in dataset.items] == [kept] and len(dataset.skipped) == 1


@pytest.mark.parametrize("content", ["", "\n\n", "file_name,text\n"])
def test_a_table_without_rows_is_refused(tmp_path, content):
    save_image(tmp_path / "a.png")
    (tmp_path / "captions.csv").write_text(content)
    with pytest.raises(DataConfigError, match=r"captions.csv': has no rows; add a header and a row for each image"):
        ImageFolder(root=str(tmp_path), size=8, captions="captions.csv")


@pytest.mark.parametrize(("name", "separator", "word"), [("c.csv", ";", "semicolons"), ("c.tsv", ",", "commas")])
def test_another_separator_is_named(root, name, separator, word):
    (root / name).write_text("\n".join(separator.join(row) for row in [("file_name", "text"), *rows()]))
    with pytest.raises(DataConfigError, match=f"its columns are separated by {word}, not by"):
        folder(root, name)


@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize(("outer", "inner"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_names_match_in_any_mix_of_unicode_normal_forms(tmp_path, written, outer, inner):
    on_disk = f"{unicodedata.normalize(outer, 'café')}/{unicodedata.normalize(inner, 'é.png')}"
    save_image(tmp_path / on_disk, 0, 4, 4)
    write(tmp_path, "c.csv", [(unicodedata.normalize(written, "café/é.png"), "a cup")])
    assert [item.name for item in folder(tmp_path, "c.csv").items] == [on_disk]
