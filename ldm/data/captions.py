"""Captions from a .txt file next to each image or from a table, and policies for missing and long captions.

Text is UTF-8, with or without a byte order mark, unless another encoding is given; UTF-16 is recognized by its mark.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ldm.data.base import DataConfigError

logger = logging.getLogger(__name__)

SIDECAR = "sidecar"
TABLES = {".csv": ",", ".tsv": "\t", ".jsonl": ""}  # suffix -> delimiter
# Default column names, tried in this order; the first of each are those of Hugging Face's image folders.
IMAGE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "txt")
CSV_FIELD_LIMIT = 1 << 24  # the csv module's 128 KiB would reject long captions before the policy sees them


class Row(NamedTuple):
    """A record of a table. `problem` says why it cannot be used; empty if it can."""

    line: int
    image: str
    captions: list[str]
    problem: str = ""


@dataclass
class CaptionPolicy:
    """Policies for missing captions (raise, skip, empty) and for those over `max_chars` (truncate, raise, skip)."""

    missing: str = "raise"
    max_chars: int = 4000
    long: str = "truncate"
    _warned: bool = field(default=False, init=False)

    def apply(self, name: str, captions: list[str], why_missing: str) -> tuple[tuple[str, ...], str]:
        """Return (captions to use, "") or ((), reason to skip the image)."""
        if not captions:
            if self.missing == "raise":
                problem = f"{name} has no caption ({why_missing})"
                raise DataConfigError("missing_caption", "raise", problem, "add one, or set {param} to skip or empty")
            return ((), "no caption") if self.missing == "skip" else (("",), "")
        longest = max(captions, key=len)
        if len(longest) <= self.max_chars:
            return tuple(captions), ""
        problem = f"a caption of {len(longest):,} characters, more than max_caption_chars {self.max_chars:,}"
        if self.long == "raise":
            advice = "shorten it, or set {param} to truncate or skip"
            raise DataConfigError("long_caption", "raise", f"{name} has {problem}", advice)
        if self.long == "skip":
            return (), problem
        if not self._warned:
            self._warned = True
            dropped = longest[self.max_chars :]
            logger.warning("%s has %s: long captions are truncated; dropped: %.200s", name, problem, dropped)
        return tuple(caption[: self.max_chars] for caption in captions), ""


def read_sidecar(path: Path, encoding: str = "utf-8") -> list[str]:
    """Return the captions of one image, one per non-blank line. Raises ValueError for text in another encoding."""
    text = _decode(path.read_bytes(), encoding)
    if problem := _undecodable(text, encoding):
        raise ValueError(problem)
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_table(
    path: Path, image_column: str | None, caption_column: str | None, encoding: str = "utf-8"
) -> Iterator[Row]:
    """Yield the records of a CSV, TSV or JSONL table.

    An image may have several records, and a JSON caption may be a list of texts.
    Raises DataConfigError for a missing column, ValueError for a file that is not text.
    """
    text = _decode(path.read_bytes(), encoding)
    delimiter = TABLES[path.suffix.lower()]
    columns: tuple[str, str] | None = None
    for line, record, problem in _csv_records(text, delimiter) if delimiter else _json_records(text):
        if problem:
            yield Row(line, "", [], problem)
            continue
        if columns is None:
            image = _column("image_column", image_column, IMAGE_COLUMNS, record, path)
            columns = image, _column("caption_column", caption_column, CAPTION_COLUMNS, record, path)
        yield _row(line, record, *columns, encoding)


def _row(line: int, record: dict, image_column: str, caption_column: str, encoding: str) -> Row:
    image, caption = record.get(image_column), record.get(caption_column)
    if not isinstance(image, str) or not image.strip():
        return Row(line, "", [], f"column {image_column!r} has no file name")
    captions = [caption] if isinstance(caption, str) else [] if caption is None else caption
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        kind = type(caption).__name__
        return Row(line, image, [], f"column {caption_column!r} holds {kind}, expected text or a list of texts")
    problem = next((p for text in (image, *captions) if (p := _undecodable(text, encoding))), "")
    return Row(line, image.strip(), [text.strip() for text in captions if text.strip()], problem)


def _csv_records(text: str, delimiter: str) -> Iterator[tuple[int, dict, str]]:
    csv.field_size_limit(max(csv.field_size_limit(), CSV_FIELD_LIMIT))
    # Strict: a stray quote in a caption must not silently swallow the records after it.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, {}, str(error)
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = [cell.strip() for cell in cells]
        elif len(cells) != len(header):
            yield line, {}, f"{len(cells)} columns, but the header has {len(header)} (an unquoted comma?)"
        else:
            yield line, dict(zip(header, cells)), ""


def _json_records(text: str) -> Iterator[tuple[int, dict, str]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            yield line, {}, f"invalid JSON ({error})"
            continue
        is_object = isinstance(record, dict)
        yield (line, record, "") if is_object else (line, {}, f"holds {type(record).__name__}, expected an object")


def _column(param: str, name: str | None, defaults: tuple[str, ...], record: dict, path: Path) -> str:
    column = name if name is not None else next((default for default in defaults if default in record), None)
    if column is None or column not in record:
        problem = f"{path} has only the columns {', '.join(map(repr, record))}"
        raise DataConfigError(param, name, problem, "set {param} to one of them")
    return column


def _decode(data: bytes, encoding: str) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        # Undecodable bytes stay as lone surrogates, so that one bad line does not hide the others.
        return data.decode(encoding, errors="surrogateescape").removeprefix("\ufeff")
    except LookupError as error:
        advice = "set {param} to utf-8, latin-1, cp1252, ..."
        raise DataConfigError("caption_encoding", encoding, "unknown encoding", advice) from error
    except UnicodeError as error:
        raise ValueError(f"not {encoding} ({error})") from error


def _undecodable(text: str, encoding: str) -> str:
    bad = next((char for char in text if "\udc80" <= char <= "\udcff"), None)
    return f"not {encoding} (byte 0x{ord(bad) - 0xDC00:02x}); set caption_encoding" if bad else ""
