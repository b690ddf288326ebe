"""Captions from a .txt file next to each image or from a table, and policies for missing and long captions.

Text is UTF-8, with or without a byte order mark, unless another encoding is given; UTF-16 is recognized by its mark.
"""

from __future__ import annotations

import codecs
import logging
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ldm.data.base import DataConfigError
from ldm.data.image import EXTENSIONS
from ldm.data.listing import relative_name
from ldm.data.splits import split_of
from ldm.data.tables import DELIMITERS, read_records
from ldm.paths import lines_of

logger = logging.getLogger(__name__)

SIDECAR = "sidecar"
TABLES = tuple(DELIMITERS)
# Default column names, tried in this order; the first of each are those of Hugging Face's image folders.
IMAGE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "txt")


class Columns(NamedTuple):
    """Default names of the columns of a table."""

    image: tuple[str, ...] = IMAGE_COLUMNS
    caption: tuple[str, ...] = CAPTION_COLUMNS
    paired: tuple[str, ...] = ()  # a second image that belongs to that in `image`
    paired_param: str = ""  # the dataset's parameter for its name


COLUMNS = Columns()


class Row(NamedTuple):
    """The image and captions of a record in a table. `problem` says why it cannot be used; empty if it can."""

    line: int
    image: str
    captions: list[str]
    problem: str = ""
    split: str | None = None  # of a column `split` with such a name, see ldm.data.splits
    paired: str = ""
    fields: Mapping[str, Any] = MappingProxyType({})  # the other columns


def usual_table(folder: Path) -> str | None:
    """Return the name of a captions table in the folder that has the usual name, captions.csv or the like."""
    names = (f"captions{suffix}" for suffix in TABLES)
    return next((name for name in names if (folder / name).is_file()), None)


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


class PromptTemplates:
    """Captions from templates such as "a photo of {}", of which each sample takes a random one.

    `{}` stands for `subject` or, if that is None, for the caption of the image. Without templates a caption is that
    text itself.
    """

    def __init__(self, templates: Sequence[str], subject: str | None, captioned: bool) -> None:
        """captioned: images have captions. Raises DataConfigError for invalid templates."""
        without = next((text for text in templates if "{}" not in text), None)
        if without is not None:
            raise DataConfigError("templates", without, "has no {}", "put {} where the subject or caption belongs")
        if templates and subject is None and not captioned:
            raise DataConfigError("subject", None, "templates need words for {}", "set {param}, or captions")
        if subject is not None and not subject.strip():
            raise DataConfigError("subject", subject, "is blank", "set {param} to words or null")
        self.templates, self.subject = tuple(templates), subject

    def __bool__(self) -> bool:
        return bool(self.templates) or self.subject is not None

    def __call__(self, caption: str) -> str:
        """Return the caption of a sample; its random number is that of the sample."""
        text = caption if self.subject is None else self.subject
        return random.choice(self.templates).replace("{}", text) if self.templates else text


def read_sidecar(path: Path, encoding: str = "utf-8") -> list[str]:
    """Return the captions of one image, one per non-blank line. Raises ValueError for text in another encoding."""
    text = _decode(path.read_bytes(), encoding)
    if problem := _undecodable(text, encoding):
        raise ValueError(problem)
    return [line.strip() for line in lines_of(text) if line.strip()]


def read_table(
    path: Path,
    image_column: str | None,
    caption_column: str | None,
    encoding: str = "utf-8",
    suffixes: Collection[str] = EXTENSIONS,
    defaults: Columns = COLUMNS,
    paired_column: str | None = None,
) -> Iterator[Row]:
    """Yield the records of a CSV, TSV or JSONL table, with the paths of the images in normal form.

    An image may have several records, and a JSON caption may be a list of texts.
    defaults: names of the columns that are None; without one for `paired`, the table has none.
    Raises DataConfigError for missing and ambiguous columns, ValueError for a file that is not text.
    """
    columns: tuple[str, str, str | None] | None = None
    for line, values, problem in read_records(path, _decode(path.read_bytes(), encoding), suffixes):
        if problem:
            yield Row(line, "", [], problem)
            continue
        if columns is None:
            image = _column("image_column", image_column, defaults.image, values, path)
            caption = _column("caption_column", caption_column, defaults.caption, values, path)
            paired = None
            if defaults.paired:
                paired = _column(defaults.paired_param, paired_column, defaults.paired, values, path)
            columns = image, caption, paired
        yield _row(line, values, *columns, encoding)


def _row(
    line: int, values: dict, image_column: str, caption_column: str, paired_column: str | None, encoding: str
) -> Row:
    image, caption = values.get(image_column), values.get(caption_column)
    paired = "" if paired_column is None else values.get(paired_column)
    for column, name in ((image_column, image), (paired_column, paired)):
        if column is not None and (not isinstance(name, str) or not name.strip()):
            return Row(line, "", [], f"column {column!r} has no file name")
    assert isinstance(image, str) and isinstance(paired, str)
    captions = [caption] if isinstance(caption, str) else [] if caption is None else caption
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        kind = type(caption).__name__
        return Row(line, image, [], f"column {caption_column!r} holds {kind}, expected text or a list of texts")
    if problem := next((p for text in (image, paired, *captions) if (p := _undecodable(text, encoding))), ""):
        return Row(line, image, [], problem)
    try:
        name, paired = relative_name(image.strip()), paired and relative_name(paired.strip())
    except ValueError as error:
        return Row(line, image, [], str(error))
    split = next((split_of(str(value)) for key, value in values.items() if key.casefold() == "split"), None)
    used = (image_column, caption_column, paired_column)
    fields = {key: value for key, value in values.items() if key not in used and key.casefold() != "split"}
    return Row(line, name, [text.strip() for text in captions if text.strip()], "", split, paired, fields)


def _column(param: str, name: str | None, defaults: tuple[str, ...], values: dict, path: Path) -> str:
    """Return the key of a named column, or of the first default; its case counts only if several keys match."""
    for wanted in (name,) if name is not None else defaults:
        alike = [key for key in values if key.casefold() == wanted.casefold()]
        found = [wanted] if wanted in alike else alike
        if len(found) > 1:
            problem = f"{path} has the columns {', '.join(map(repr, found))}"
            raise DataConfigError(param, name, problem, "set {param} to one of them")
        if found:
            return found[0]
    problem = f"{path} has only the columns {', '.join(map(repr, values))}"
    raise DataConfigError(param, name, problem, "set {param} to one of them")


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
    bad = next((char for char in text if "\ud800" <= char <= "\udfff"), None)
    if bad is None:
        return ""
    if "\udc80" <= bad <= "\udcff":  # `_decode` makes them of bytes
        return f"not {encoding} (byte 0x{ord(bad) - 0xDC00:02x}); set caption_encoding"
    return f"not text (a lone surrogate, U+{ord(bad):X})"
