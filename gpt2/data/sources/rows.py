"""The rows of JSON lines and CSV, each a document: the text of one column."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gpt2.data.sources.text import MAX_ROW_CHARACTERS, Document, check_row, decode, lines, normalize
from gpt2.errors import UserError, one_line

MAX_SHOWN_COLUMNS, MAX_SHOWN_CHARACTERS = 10, 40
JSON_TYPES = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def missing_column(place: str, column: str, columns: Sequence[str]) -> UserError:
    """The error of a column that is not there; names those that are. place: the file, and the line if it has lines."""
    shown = ", ".join(repr(name[:MAX_SHOWN_CHARACTERS]) for name in columns[:MAX_SHOWN_COLUMNS])
    more = f" and {len(columns) - MAX_SHOWN_COLUMNS:,} more" if len(columns) > MAX_SHOWN_COLUMNS else ""
    return UserError(f"{place} has no column {column!r}, but {shown or 'none'}{more}; set corpus.text_column")


def repeated_column(place: str, column: str) -> UserError:
    """The error of a column that is there twice."""
    return UserError(f"{place} has the column {column!r} more than once; rename one of them")


def jsonl_documents(chunks: Iterable[bytes], name: str, column: str) -> Iterator[Document]:
    """A document for each line of JSON lines: the value of the key `column`, empty for null.

    name: of the file, for messages. Raises UserError with the line if it is not an object with a text in that key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) != len(pairs) and sum(key == column for key, _ in pairs) > 1:
            raise repeated_column(place, column)
        return row

    decoder = json.JSONDecoder(object_pairs_hook=unique)
    for number, line in enumerate(lines(decode(chunks, name), name), 1):
        if not line or line.isspace():
            continue
        place = f"{name}, line {number}:"
        try:
            row = decoder.decode(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{place} not JSON ({error.msg} at character {error.colno}); correct or delete it"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place} cannot be read as JSON ({one_line(error)}); correct or delete it") from None
        if not isinstance(row, dict):
            raise UserError(f"{place} expected a JSON object such as {{{json.dumps(column)}: ...}}")
        if column not in row:
            raise missing_column(place, column, list(row))
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise UserError(f"{place} the column {column!r} is {JSON_TYPES[type(text)]}; expected text")
        if text and "\\u" in line:
            _check_unicode(text, place)
        yield (normalize(text or ""),)


def _check_unicode(text: str, place: str) -> None:
    """Raises UserError for half a pair of surrogates, which JSON can escape and UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place} {text[error.start]!r} is half a character; correct or delete it") from None


def csv_documents(chunks: Iterable[bytes], name: str, column: str) -> Iterator[Document]:
    """A document for each row of CSV, by RFC 4180 with a header: the field in `column`.

    name: of the file, for messages. Raises UserError with the line if the column is missing, or if a row has another
    number of fields than the header.
    """
    rows = _csv_rows(chunks, name)
    _, header = next(rows, (0, None))
    if header is None:
        return
    if column not in header:
        raise missing_column(name, column, header)
    if header.count(column) > 1:
        raise repeated_column(name, column)
    index = header.index(column)
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(
                f"{name}, line {line}: {len(row):,} fields, but the header has {len(header):,}; put texts with commas "
                "or line ends in quotes"
            )
        yield (normalize(row[index]),)


def _csv_rows(chunks: Iterable[bytes], name: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its first line."""
    length = 0

    def counted() -> Iterator[str]:
        nonlocal length
        for line in lines(decode(chunks, name), name):
            length += len(line)
            check_row(length, name, first)
            yield line + "\n"

    csv.field_size_limit(MAX_ROW_CHARACTERS)
    reader = csv.reader(counted(), strict=True)
    while True:
        first, length = reader.line_num + 1, 0
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{name}, line {first}: not CSV ({error}); a quote in a text is written twice") from None
        if row is None:
            return
        if row:
            yield first, row
