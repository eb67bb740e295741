"""Parquet files, one document a record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.data.readers.reading import (
    TEXTS_PER_CALL,
    Reading,
    add_file,
    files_to_read,
    import_extra,
    require_column,
    string_field,
    tokenize,
)
from potstill.errors import UserError, one_line
from potstill.io.safe_open import opened

PATTERNS = ("*.parquet",)


def read(path: Path, tokenizer: Any, column: str = "text") -> Reading:
    """One document a record, the string in `column`."""
    reading = Reading(iter(()))
    drop_nulls = f'table.filter(~pyarrow.compute.is_null(table["{column}"])) and write it again'

    import_parquet()  # before anything is read
    found = (
        each for file in files_to_read(path, PATTERNS, reading) for each in records(file, reading, column)
    )
    texts = ((where, string_field(where, record, column, drop_nulls)) for where, record in found)
    reading.documents = tokenize(texts, tokenizer)
    return reading


def import_parquet() -> Any:
    """UserError where the library is not installed."""
    import_extra("pyarrow")
    return import_extra("pyarrow.parquet")


def records(file: Path, reading: Reading, column: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record of a file as a mapping, with its place; with `column`, of that one alone."""
    where, number = str(file), 0
    try:
        # The stream and not its name, which the library can only read where it is UTF-8.
        with (
            opened(file, "Parquet", "Leave it out, or write it again.") as stream,
            import_parquet().ParquetFile(stream, page_checksum_verification=True) as table,
        ):
            if column is not None:
                require_column(file, column, table.schema_arrow.names)
            columns = None if column is None else [column]
            for batch in table.iter_batches(columns=columns, batch_size=TEXTS_PER_CALL):
                for row in range(batch.num_rows):
                    where = f"{file}:{number}"
                    yield where, {name: batch[name][row].as_py() for name in batch.schema.names}
                    number += 1
            if number != table.metadata.num_rows:
                raise ValueError(f"{number} records, its footer says {table.metadata.num_rows}")
    except UserError:
        raise
    except Exception as error:  # damaged pages raise more than Arrow's own errors
        raise UserError(f"{where}: not a readable Parquet file: {one_line(error)}") from error
    add_file(file, reading)  # last: a file that is no Parquet is not hashed first
