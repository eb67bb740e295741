"""Documents of token ids end to end: in memory, or in two files of a folder, memory-mapped.

The files hold what memory would, without a header: ids in four bytes, little-endian, and a byte for each id
that is 1 where it may be predicted.
"""

from __future__ import annotations

import hashlib
import io
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from potstill.errors import UserError

ID, BEARS, PLACE = np.dtype("<u4"), np.dtype(np.bool_), np.dtype("<i8")
BLOCK = 2**17
"""Numbers processed at a time, where an array may be larger than memory."""


class Stream:
    """Appended to, then read. `folder` None keeps it in memory."""

    def __init__(self, folder: Path | None, name: str) -> None:
        self.lengths = array("q")
        """Tokens of each document."""
        self._files = [
            _Numbers(folder, f"{name}.{what}", dtype) for what, dtype in (("ids", ID), ("bears", BEARS))
        ]
        self._starts: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def append(self, ids: NDArray[np.uint32], bears: NDArray[np.bool_] | None) -> None:
        """A document. `bears` None: all of it may be predicted, but for its first token, which never may:
        nothing in its own document comes before it.
        """
        bears = np.ones(len(ids), np.bool_) if bears is None else np.array(bears)
        bears[:1] = False
        for file, numbers in zip(self._files, (ids, bears), strict=True):
            file.append(numbers)
        self.lengths.append(len(ids))
        self._starts = None

    def __getitem__(self, number: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """ids and bears of one document."""
        start = int(self.starts()[number])
        part = slice(start, start + self.lengths[number])
        return self.ids()[part], self.bears()[part]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def starts(self) -> NDArray[np.int64]:
        """Where each document begins."""
        if self._starts is None:
            self._starts = np.cumsum([0, *self.lengths], dtype=np.int64)[:-1]
        return self._starts

    def ids(self) -> NDArray[np.uint32]:
        return self._files[0].whole()

    def bears(self) -> NDArray[np.bool_]:
        return self._files[1].whole()

    def discard(self) -> None:
        """Remove its files; arrays already read stay valid."""
        for file in self._files:
            file.discard()


class _Numbers:
    """One array that grows, then is read."""

    def __init__(self, folder: Path | None, name: str, dtype: np.dtype[Any]) -> None:
        self.path = None if folder is None else folder / name
        self.dtype = dtype
        self.file: BinaryIO = io.BytesIO() if self.path is None else self.path.open("wb")
        self.read: NDArray[Any] | None = None

    def append(self, numbers: NDArray[Any]) -> None:
        self.file.write(np.ascontiguousarray(numbers, dtype=self.dtype).data)

    def whole(self) -> NDArray[Any]:
        if self.read is None:
            if isinstance(self.file, io.BytesIO):
                self.read = np.frombuffer(self.file.getbuffer(), dtype=self.dtype)
            else:
                assert self.path is not None
                self.file.close()
                self.read = mapped(self.path, self.dtype)
        return self.read

    def discard(self) -> None:
        self.read = None
        if self.path is not None:
            self.file.close()
            self.path.unlink()
        self.file = io.BytesIO()


def mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The numbers of a file, memory-mapped."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.asarray(np.memmap(path, dtype, "r"))


def hashed(array: NDArray[Any]) -> bytes:
    """sha256 of its bytes."""
    digest = hashlib.sha256()
    for _, block in in_blocks(array):
        digest.update(block.data)
    return digest.digest()


def in_blocks(array: NDArray[Any], whole: int = 1) -> Iterator[tuple[int, NDArray[Any]]]:
    """Contiguous pieces of an array with the place of each, their lengths a multiple of `whole`."""
    size = max(BLOCK // whole, 1) * whole
    for start in range(0, len(array), size):
        yield start, np.ascontiguousarray(array[start : start + size])


def places_after(array_: NDArray[Any], number: int) -> array[int]:
    """The index after each occurrence of `number` in an array that may be larger than memory."""
    places = array("q")
    for start, block in in_blocks(array_):
        places.extend((np.flatnonzero(block == number) + start + 1).tolist())
    return places


def require_ids(where: str, ids: NDArray[np.uint32], vocab_size: int, offset: int = 0) -> None:
    """Refuse an id outside the vocabulary, with its place."""
    if len(ids) and int(ids.max()) >= vocab_size:
        at = int(np.argmax(ids >= vocab_size))
        raise UserError(
            f"{where}: id {int(ids[at])} at token {offset + at} is outside the vocabulary of {vocab_size}"
            " ids. The corpus was tokenized for another teacher, or has another dtype."
        )
