"""JSON lines, one document a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.data.readers.folders import files_of
from potstill.data.readers.reading import MARK, Reading, lines_of, string_field, tokenize
from potstill.errors import UserError, one_line
from potstill.io.safe_open import parse_json

PATTERNS = ("*.jsonl",)


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
    """Each line of each file as a mapping, with its place."""
    for file in files_of(path, PATTERNS):
        for number, line in enumerate(lines_of(file, reading), start=1):
            if number == 1:
                line = line.removeprefix(MARK.encode())
            if line.strip():
                where = f"{file}:{number}"
                try:
                    record = parse_json(line)
                except ValueError as error:
                    raise UserError(f"{where}: not a line of JSON: {one_line(error)}") from error
                if not isinstance(record, dict):
                    raise UserError(f"{where}: {type(record).__name__}, not an object with named fields.")
                yield where, record
