"""Parquet files, one document a record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from potstill.data.readers.folders import files_of
from potstill.data.readers.reading import (
    TEXTS_PER_CALL,
    Reading,
    add_file,
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
    _, pq = import_extra("pyarrow"), import_extra("pyarrow.parquet")
    reading = Reading(iter(()))
    drop_nulls = f'table.filter(~pyarrow.compute.is_null(table["{column}"])) and write it again'

    def texts() -> Iterator[tuple[str, str]]:
        for file in files_of(path, PATTERNS):
            where, number = str(file), 0
            try:
                # The stream and not its name, which the library can only read where it is UTF-8.
                with (
                    opened(file, "Parquet", "Leave it out, or write it again.") as stream,
                    pq.ParquetFile(stream, page_checksum_verification=True) as table,
                ):
                    require_column(file, column, table.schema_arrow.names)
                    for batch in table.iter_batches(columns=[column], batch_size=TEXTS_PER_CALL):
                        for value in batch.column(0):
                            where = f"{file}:{number}"
                            yield where, string_field(where, {column: value.as_py()}, column, drop_nulls)
                            number += 1
                    if number != table.metadata.num_rows:
                        raise ValueError(f"{number} records, its footer says {table.metadata.num_rows}")
            except UserError:
                raise
            except Exception as error:  # damaged pages raise more than Arrow's own errors
                raise UserError(f"{where}: not a readable Parquet file: {one_line(error)}") from error
            add_file(file, reading)  # last: a file that is no Parquet is not hashed first

    reading.documents = tokenize(texts(), tokenizer)
    return reading
