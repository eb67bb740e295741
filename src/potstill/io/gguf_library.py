"""The gguf library, and Transformers' use of it, without what makes reading a file three times slower than it is."""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

LENGTH = struct.Struct("=Q")
NATIVE = "I"
"""What the library calls the byte order of this machine."""


class Reader(gguf.GGUFReader):  # type: ignore[misc]  # untyped
    """The library's reader, whose hundreds of thousands of slices are plain arrays: those of a `memmap` are of a
    subclass, whose making takes most of the time. A vocabulary's are cut in one loop, not by five calls each.
    """

    @property
    def data(self) -> NDArray[np.uint8]:
        """The file's bytes, mapped."""
        return self._plain

    @data.setter
    def data(self, mapped: NDArray[np.uint8]) -> None:
        self._plain = mapped.view(np.ndarray)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[NDArray[Any]], list[int], list[Any]]:
        if raw_type == GGUFValueType.ARRAY and self.byte_order == NATIVE:
            of, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            start, kind, step = orig_offs + 12, GGUFValueType(of[0]), 1
            parts: list[NDArray[Any]] = []
            if kind == GGUFValueType.STRING:
                parts, step = self._strings(start, int(count[0])), 2
            elif kind in self.gguf_scalar_to_np:
                parts = [*self._get(start, self.gguf_scalar_to_np[kind], count[0]).reshape(-1, 1)]
            if parts:  # the library's own way is for arrays of none, and of arrays
                size = 12 + sum(part.nbytes for part in parts)
                values = [*range(1 + step, 2 + len(parts), step)]
                return size, [of, count, *parts], values, [GGUFValueType.ARRAY, kind]
        read: tuple[int, list[NDArray[Any]], list[int], list[Any]]
        read = super()._get_field_parts(orig_offs, raw_type)
        return read

    def _strings(self, start: int, count: int) -> list[NDArray[Any]]:
        """Length and bytes of each of so many strings from there on, in turns."""
        data, memory, parts = self._plain, self._plain.data, list[NDArray[Any]]()
        for _ in range(count):
            text = start + LENGTH.size
            end = text + LENGTH.unpack_from(memory, start)[0]
            parts += data[start:text].view(np.uint64), data[text:end]
            start = end
        return parts


@contextlib.contextmanager
def quick_gguf() -> Iterator[None]:
    """Transformers reads with `Reader`, and makes gguf's table of tensor names once, not once for every module."""
    library: Any = gguf
    reader, names = library.GGUFReader, library.get_tensor_name_map
    library.GGUFReader, library.get_tensor_name_map = Reader, functools.lru_cache(names)
    try:
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map = reader, names
