"""Headerless little-endian shards of token ids, memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.data.memmap import places_after, require_ids
from potstill.data.readers.folders import files_of, has_match
from potstill.data.readers.reading import Document, Reading, add_file
from potstill.errors import UserError
from potstill.io.safe_open import opened

ROWS_PER_PIECE = 16
"""A shard without document ends is cut into pieces of so many rows, so that some of them can be held out."""
ZEROS = 2**16
LOOKED_AT_BYTES = 2**22
"""Of each shard, to tell the width of its ids."""
CLEAR = 64
"""Ids, at least, that must speak for another width: a few zeros in a row are chance."""
WIDTHS = {"uint16": 2, "uint32": 4}


def read(path: Path, dtype: str, vocab_size: int, document_end: int | None, tokens_per_row: int) -> Reading:
    """Headerless little-endian shards of ids, memory-mapped. A document ends after each `document_end`.

    Of a folder the `*.bin` files are read, or all of them where none has that name.
    """
    if document_end is not None and document_end >= vocab_size:
        raise UserError(
            f"corpus.document_end: id {document_end} is outside the vocabulary of {vocab_size} ids."
        )
    width = WIDTHS[dtype]
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
            ids = np.memmap(file, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
            _require_width(file, ids, dtype, vocab_size)
            add_file(file, reading)
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
    return files_of(path, ("*.bin",) if has_match(path, ("*.bin",)) else ("*",))


def _require_width(file: Path, ids: NDArray[Any], dtype: str, vocab_size: int) -> None:
    """Refuse a shard whose ids are of another width, where its first numbers show it.

    Wider ids read as narrow ones have their upper half, which is mostly 0, at every second place. Narrow ids
    read as wide ones are two in one, and beyond any vocabulary.
    """
    width = WIDTHS[dtype]
    numbers = np.asarray(ids[: min(len(ids) * width, LOOKED_AT_BYTES) // 8 * 8 // width])
    if shown := _upper_halves(numbers, (vocab_size - 1) >> 8 * width):
        # Of 8-byte ids, as NumPy writes by default, read as 2 bytes: the 4-byte ones are halves again.
        is_64 = width == 4 or _upper_halves(numbers.view("<u4"), 0) != ""
        todo = "Write them as uint32, and set corpus.dtype: uint32" if is_64 else "Set corpus.dtype: uint32"
        raise UserError(f"{file}: ids of {8 if is_64 else 4} bytes, not {dtype}: {shown}. {todo}.")
    if dtype == "uint32" and (beyond := int((numbers >= vocab_size).sum())) * 2 > len(numbers):
        at = int(np.argmax(numbers >= vocab_size))
        narrow = numbers.view("<u2")
        if beyond * 2 >= CLEAR and int(narrow.max()) < vocab_size:
            raise UserError(
                f"{file}: ids of 2 bytes, not uint32: id {numbers[at]} at token {at} and {beyond - 1} more of the"
                f" first {len(numbers)} are outside the vocabulary of {vocab_size} ids, and none of them is when"
                " read as uint16. Set corpus.dtype: uint16."
            )


def _upper_halves(numbers: NDArray[Any], most: int) -> str:
    """What shows that every second number is an upper half, at most `most`; empty where nothing does.

    Both places are counted by the same rule, so that an id 0 that is frequent, or padding, speaks for nothing:
    in a text it stands at even and odd places alike.
    """
    even, odd = (int((numbers[first::2] > most).sum()) for first in (0, 1))
    if even < CLEAR or odd * 10 > even:
        return ""
    what = "are not 0" if most == 0 else f"are above {most}"
    return f"of its first {len(numbers)} numbers {even} at even places {what}, and {odd} at odd ones"


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
