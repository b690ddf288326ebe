"""Records of CSV, TSV and JSONL tables, by the same rules.

A broken record is reported with its line and does not hide the next; a column or key appears once; only line ends (LF,
CR LF, CR) end a line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ldm.data.base import DataConfigError
from ldm.paths import lines_of

DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": ""}  # of the tables with this suffix
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
FIELD_LIMIT = 1 << 24  # characters: the csv module's 128 KiB would reject long captions before their policy sees them


class Record(NamedTuple):
    """A record of a table. `problem` says why it cannot be used; empty if it can."""

    line: int
    values: dict[str, Any]
    problem: str = ""


def read_records(path: Path, text: str, suffixes: Collection[str]) -> Iterator[Record]:
    """Yield the records in the text of a table, whose format is that of its file name.

    suffixes: of file names: a quoted field may span lines, but not lines that look like records, with such a name.
    """
    delimiter = DELIMITERS[path.suffix.lower()]
    return _csv_records(path, lines_of(text), delimiter, suffixes) if delimiter else _json_records(lines_of(text))


def _csv_records(path: Path, lines: list[str], delimiter: str, suffixes: Collection[str]) -> Iterator[Record]:
    header: list[str] = []
    at = 0
    csv.field_size_limit(FIELD_LIMIT)
    while at < len(lines):
        line, first = at + 1, lines[at]
        if not first.strip():
            at += 1
            continue
        reader = csv.reader(_field_lines(lines, at, header, delimiter, suffixes), delimiter=delimiter, strict=True)
        try:
            cells = next(reader)
        except csv.Error as error:
            problem = "a quoted field is not closed" if "unexpected end" in str(error) else str(error)
            yield Record(line, {}, f"{problem} (a stray quote?)")
            at += 1  # the lines that the field has swallowed may be records
            continue
        at += reader.line_num
        while cells and not cells[-1].strip() and len(cells) > len(header):
            cells.pop()  # spreadsheets pad rows with empty cells
        if not cells:
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            if repeated := next((name for name in header if name and header.count(name) > 1), None):
                raise DataConfigError("captions", str(path), f"has two columns {repeated!r}", "rename one of them")
            if len(header) == 1 and (other := next((each for each in _SEPARATORS if each in header[0]), None)):
                problem = f"its columns are separated by {_SEPARATORS[other]}, not by {_SEPARATORS[delimiter]}"
                advice = "save it with commas as .csv, or with tabs as .tsv"
                raise DataConfigError("captions", str(path), problem, advice)
        elif len(cells) != len(header):
            yield Record(line, {}, f"{len(cells)} columns, but the header has {len(header)} (an unquoted comma?)")
        else:
            yield Record(line, dict(zip(header, cells)))


def _field_lines(
    lines: list[str], start: int, header: list[str], delimiter: str, suffixes: Collection[str]
) -> Iterator[str]:
    """Yield the lines of a record, with their ends; raise csv.Error at a further line that looks like a record."""
    for at in range(start, len(lines)):
        if at > start and _looks_like_record(lines[at], len(header), delimiter, suffixes):
            raise csv.Error(f"a quoted field swallows line {at + 1}, which looks like a record")
        yield lines[at] + "\n"


def _looks_like_record(line: str, columns: int, delimiter: str, suffixes: Collection[str]) -> bool:
    cells = next(csv.reader([line], delimiter=delimiter), [])
    return len(cells) >= columns > 0 and any(Path(cell.strip()).suffix.lower() in suffixes for cell in cells)


def _json_records(lines: list[str]) -> Iterator[Record]:
    for line, content in enumerate(lines, start=1):
        if not content.strip():
            continue
        try:
            values = json.loads(content, object_pairs_hook=_unique, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            yield Record(line, {}, f"invalid JSON ({error})")
            continue
        is_object = isinstance(values, dict)
        yield (
            Record(line, values)
            if is_object
            else Record(line, {}, f"holds {type(values).__name__}, expected an object")
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a value of JSON")
