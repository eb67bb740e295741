"""Headerless little-endian shards of token ids, memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from potstill.data.memmap import places_after, require_ids
from potstill.data.readers.reading import Document, Reading, add_file, files_of
from potstill.errors import UserError
from potstill.io.safe_open import opened

ROWS_PER_PIECE = 16
"""A shard without document ends is cut into pieces of so many rows, so that some of them can be held out."""
ZEROS = 2**16


def read(path: Path, dtype: str, vocab_size: int, document_end: int | None, tokens_per_row: int) -> Reading:
    """Headerless little-endian shards of ids, memory-mapped. A document ends after each `document_end`.

    Of a folder the `*.bin` files are read, or all of them where none has that name.
    """
    if document_end is not None and document_end >= vocab_size:
        raise UserError(
            f"corpus.document_end: id {document_end} is outside the vocabulary of {vocab_size} ids."
        )
    width = {"uint16": 2, "uint32": 4}[dtype]
    reading = Reading(iter(()))

    def documents() -> Iterator[Document]:
        for file in shards_of(path):
            size = _shard_bytes(file)
            if size == 0:
                raise UserError(f"{file}: an empty shard. Leave it out or write it again.")
            if size % width:
                raise UserError(
                    f"{file}: {size} bytes are not a whole number of {dtype} ids of {width} bytes."
                    " The shard is cut off, or the dtype is another."
                )
            add_file(file, reading)
            ids = np.memmap(file, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
            ends = () if document_end is None else places_after(ids, document_end)
            cuts = ends or range(ROWS_PER_PIECE * tokens_per_row, len(ids), ROWS_PER_PIECE * tokens_per_row)
            for start, end in pairwise(chain([0], cuts, [len(ids)])):
                if end > start:
                    part = np.asarray(ids[start:end], dtype=np.uint32)
                    require_ids(str(file), part, vocab_size, start)
                    yield Document(f"{file}:{start}", part)

    reading.documents = documents()
    return reading


def shards_of(path: Path) -> list[Path]:
    return files_of(path, ("*.bin",) if any(path.rglob("*.bin")) else ("*",))


def _shard_bytes(file: Path) -> int:
    """Its size; refused where its ends are zeros: space that was reserved and never written."""
    with opened(file, "token ids", "Leave it out, or write it again.") as stream:
        first = stream.read(ZEROS)
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - ZEROS, 0))
        for part, where in ((first, "first"), (stream.read(ZEROS), "last")):
            if len(part) == ZEROS and not any(part):
                raise UserError(
                    f"{file}: its {where} {ZEROS} bytes are zero: never written, or cut off. Write it again."
                )
    return size
