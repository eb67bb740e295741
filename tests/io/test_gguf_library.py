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
    writer.add_float32("rate", 0.5)
    writer.add_tensor("weights", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    own, quick = gguf.GGUFReader(path), Reader(path)
    assert {name: field.contents() for name, field in quick.fields.items()} == {
        name: field.contents() for name, field in own.fields.items()
    }
    (made,), (wanted,) = quick.tensors, own.tensors
    assert made.name == wanted.name and made.data_offset == wanted.data_offset
    assert np.array_equal(made.data, wanted.data) and made.data.shape == (2, 3)


def test_the_library_is_as_it_was_behind_it() -> None:
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with quick_gguf():
        assert gguf.GGUFReader is Reader
        arch = gguf.MODEL_ARCH.LLAMA
        assert gguf.get_tensor_name_map(arch, 2) is gguf.get_tensor_name_map(arch, 2)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
