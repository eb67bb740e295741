"""The gguf library, and Transformers' use of it, without what makes reading a file three times slower than it is."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray


class Reader(gguf.GGUFReader):  # type: ignore[misc]  # untyped
    """The library's reader, whose hundreds of thousands of slices are plain arrays: those of a `memmap` are of a
    subclass, whose making takes most of the time.
    """

    @property
    def data(self) -> NDArray[np.uint8]:
        """The file's bytes, mapped."""
        return self._plain

    @data.setter
    def data(self, mapped: NDArray[np.uint8]) -> None:
        self._plain = mapped.view(np.ndarray)


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
