"""Records of JSON, one a line; of a `.json` file also as one array."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.data.readers.reading import (
    MARK,
    Reading,
    files_to_read,
    lines_of,
    not_utf8,
    string_field,
    tokenize,
)
from potstill.errors import UserError, one_line
from potstill.io.safe_open import parse_json

PATTERNS = ("*.jsonl", "*.ndjson", "*.jsonlines")
FILES = (*PATTERNS, "*.json")
"""Of a folder's `.json` files those that hold an array: others describe the data (`folders.files_with`)."""


JSON_TYPES = {"str": "a string", "list": "a list", "int": "a number", "float": "a number", "NoneType": "null"}


def read(path: Path, tokenizer: Any, field: str = "text") -> Reading:
    """One document a line, the string under `field`."""
    reading = Reading(iter(()))
    drop_nulls = f"""jq -c 'select(.["{field}"] != null)'"""
    texts = (
        (where, string_field(where, record, field, drop_nulls)) for where, record in records(path, reading)
    )
    reading.documents = tokenize(texts, tokenizer)
    return reading


def records(path: Path, reading: Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of each file, with their places."""
    for file in files_to_read(path, FILES, reading):
        yield from records_of(file, reading)


def records_of(file: Path, reading: Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record as a mapping, with its place: of a `.json` file what it holds, an array or lines."""
    if file.suffix.lower() == ".json" and not _has_lines(file):
        return records_of_array(file, reading)
    return records_of_lines(file, reading)


def _has_lines(file: Path) -> bool:
    """Whether the first line is a record by itself: many data sets have such files under this name."""
    line = next(lines_of(file, Reading(iter(())), whole=True), b"").removeprefix(MARK.encode())
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def records_of_lines(file: Path, reading: Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of a file as a mapping, with its place."""
    for number, line in enumerate(lines_of(file, reading), start=1):
        if number == 1:
            line = line.removeprefix(MARK.encode())
        if line.strip():
            where = f"{file}:{number}"
            try:
                record = parse_json(line)
            except UnicodeDecodeError as error:
                raise not_utf8(where, error) from error
            except ValueError as error:
                cut = " The file ends there: was it cut off?" if not line.endswith(b"\n") else ""
                raise UserError(f"{where}: not a line of JSON: {one_line(error)}{cut}") from error
            yield where, _mapping(where, record)


def records_of_array(file: Path, reading: Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each element of a file that is one array of JSON, with its number from 0; the file is held in memory."""
    content = b"".join(lines_of(file, reading, whole=True)).removeprefix(MARK.encode())
    try:
        records = parse_json(content)
    except UnicodeDecodeError as error:
        raise not_utf8(str(file), error) from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {one_line(error)} Write one record a line, as .jsonl.") from error
    if not isinstance(records, list):
        raise UserError(
            f"{file}: {type(records).__name__}, not an array of records. Write one a line, as .jsonl."
        )
    for number, record in enumerate(records):
        yield f"{file}:{number}", _mapping(f"{file}:{number}", record)


def _mapping(where: str, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        kind = JSON_TYPES.get(type(record).__name__, "a value")
        todo = "Write each record as {…}."
        if isinstance(record, str):
            todo = "Of texts alone records are made by jq -c '{text: .}', of an array by jq -c '.[] | {text: .}'."
        raise UserError(f"{where}: {kind}, not an object with named fields. {todo}")
    mapping: dict[str, Any] = record
    return mapping
