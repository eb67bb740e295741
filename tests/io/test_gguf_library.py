"""The quick reader reads what the library's own does."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from potstill.io.gguf_library import Reader, quick_gguf


def test_fields_and_tensors_are_those_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "made.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("words", ["a", "é", ""])
    writer.add_array("scores", [0.5, -1.0, 2.0])
    writer.add_array("kinds", [3, 1])
    writer.add_float32("rate", 0.5)
    writer.add_tensor("weights", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    own, quick = gguf.GGUFReader(path), Reader(path)
    assert list(quick.fields) == list(own.fields)
    for made, wanted in zip(quick.fields.values(), own.fields.values(), strict=True):
        assert made.contents() == wanted.contents()
        assert (made.offset, made.name, made.data, made.types) == (
            wanted.offset,
            wanted.name,
            wanted.data,
            wanted.types,
        )
        for part, other in zip(made.parts, wanted.parts, strict=True):
            assert part.dtype == other.dtype and np.array_equal(part, other)
    (tensor,), (own_tensor,) = quick.tensors, own.tensors
    assert tensor.name == own_tensor.name and tensor.data_offset == own_tensor.data_offset
    assert np.array_equal(tensor.data, own_tensor.data) and tensor.data.shape == (2, 3)


def test_the_library_is_as_it_was_behind_it() -> None:
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with quick_gguf():
        assert gguf.GGUFReader is Reader
        arch = gguf.MODEL_ARCH.LLAMA
        assert gguf.get_tensor_name_map(arch, 2) is gguf.get_tensor_name_map(arch, 2)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
