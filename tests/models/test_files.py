"""Weight files: good ones pass with what they hold, faults are refused by name, lies take no memory."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import demo_gguf
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from potstill.errors import UserError
from potstill.models.safetensors_files import (
    check_gguf,
    check_model_files,
    check_safetensors,
    file_sha256,
    folder_sha256,
    tensor_shapes,
)

MIB = 1 << 20
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
ARRAYS = {
    "embed.weight": np.arange(24, dtype=np.float32).reshape(6, 4),
    "norm.weight": np.ones(4, dtype=np.float16),
    "steps": np.array(7, dtype=np.int64),
}


def refusal(check: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(UserError) as caught:
        check(path)
    text = str(caught.value)
    assert text.startswith(str(path.parent)), text
    assert "\n" not in text and text.isprintable() and len(text) < 1000, text
    return text


def make_safetensors(path: Path) -> Path:
    save_file(ARRAYS, path, metadata={"format": "pt"})
    return path


def with_header(path: Path, header: Any, data: bytes = b"", num_bytes: int | None = None) -> Path:
    """A safetensors file by its written layout, not by the library: so that it can be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if num_bytes is None else num_bytes) + text + data)
    return path


def tensor(shape: Any = (2,), span: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


def make_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_token_list(["<eos>", "a", "bé"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
    writer.add_tensor("token_embd.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("output_norm.weight", np.ones(5, dtype=np.float32))
    packed = gguf.quants.quantize(np.ones((2, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


STRING, ARRAY, UINT32 = 8, 9, 4
LLAMA = text("general.architecture") + struct.pack("<I", STRING) + text("llama")


def gguf_bytes(
    key_values: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    version: int = 3,
    num_tensors: int | None = None,
    num_key_values: int | None = None,
) -> bytes:
    """A GGUF file by its written layout, not by the library: so that it can be wrong."""
    key_values, tensors = [LLAMA] if key_values is None else key_values, tensors or []
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(key_values) if num_key_values is None else num_key_values,
    )
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(key_values) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data if tensors else head


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(element: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", element, count) + content


def gguf_tensor(name: str = "w", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    make_safetensors(folder / "model.safetensors")
    return folder


def make_sharded(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {}
    for number, (name, array) in enumerate(ARRAYS.items(), start=1):
        file = f"model-{number:05}-of-00003.safetensors"
        save_file({name: array}, folder / file)
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def peak_bytes(check: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        check()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- safetensors


def test_a_good_safetensors_file_passes_with_its_dtypes_and_shapes(tmp_path: Path) -> None:
    found = check_safetensors(make_safetensors(tmp_path / "a.safetensors"))
    assert found == {"embed.weight": ("F32", (6, 4)), "norm.weight": ("F16", (4,)), "steps": ("I64", ())}


def test_a_safetensors_file_with_half_byte_and_empty_tensors_passes(tmp_path: Path) -> None:
    header = {
        "a": tensor((4,), (0, 2), "F4"),
        "b": tensor((0, 3), (2, 2)),
        "c": tensor((4,), (2, 5), "F6_E2M3"),
    }
    found = check_safetensors(with_header(tmp_path / "a.safetensors", header, bytes(5)))
    assert {name: shape for name, (_, shape) in found.items()} == {"a": (4,), "b": (0, 3), "c": (4,)}


def test_every_truncation_of_a_safetensors_file_is_refused_with_both_sizes(tmp_path: Path) -> None:
    whole = make_safetensors(tmp_path / "whole.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for num_bytes in range(len(whole)):
        cut.write_bytes(whole[:num_bytes])
        said = refusal(check_safetensors, cut)
        assert "ends early" in said and f"the file has {num_bytes}." in said, said
    assert f"needs {len(whole)} bytes" in said


def test_a_safetensors_file_that_is_too_long_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = make_safetensors(tmp_path / "a.safetensors")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0")
    said = refusal(check_safetensors, path)
    assert "too long" in said and f"needs {size} bytes, the file has {size + 1}." in said


@pytest.mark.parametrize(
    ("header", "data", "word"),
    [
        ({"a": tensor(dtype="F33")}, 8, "tensor a: dtype 'F33' is unknown"),
        ({"a": tensor(dtype=["F32"])}, 8, "tensor a: dtype ['F32'] is unknown"),
        ({"a": tensor(shape=(3,))}, 8, "tensor a: F32 [3] takes 96 bits, its data_offsets give 64"),
        ({"a": tensor(shape=(3,), span=(0, 1), dtype="F4")}, 1, "takes 12 bits"),
        ({"a": tensor(shape=(-2,))}, 8, "shape [-2] is not a list"),
        ({"a": tensor(shape=(True, 2))}, 8, "shape [True, 2] is not a list"),
        ({"a": tensor(shape=(2.0,))}, 8, "shape [2.0] is not a list"),
        ({"a": tensor(shape=2)}, 8, "shape 2 is not a list"),
        ({"a": tensor(shape=(1,) * 64 + (2,))}, 8, "at most 64 sizes"),
        ({"a": tensor(shape=(2**62, 2**62, 2**62))}, 8, "its data_offsets give 64"),
        ({"a": tensor(shape=(2**63,))}, 8, "is not a list"),
        ({"a": tensor(span=(0, 8, 16))}, 8, "data_offsets [0, 8, 16] are not two"),
        ({"a": tensor(span=(8, 0))}, 8, "its data_offsets give -64"),
        ({"a": tensor(span=(-8, 0))}, 8, "data_offsets [-8, 0] are not two"),
        ({"a": tensor(span=(8, 16))}, 16, "tensor a starts at byte 8 of the data, not at 0"),
        ({"a": tensor(), "b": tensor(span=(4, 12))}, 12, "tensor b starts at byte 4 of the data, not at 8"),
        ({"a": tensor(), "b": tensor(span=(12, 20))}, 20, "tensor b starts at byte 12 of the data, not at 8"),
        ({"a": tensor(), "b": tensor()}, 8, "tensor b starts at byte 0 of the data, not at 8"),
        ({"a": [0, 8]}, 8, "tensor a: dtype None is unknown"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "data_offsets None are not two"),
        ({"__metadata__": {"x": 1}, "a": tensor()}, 8, "__metadata__ is not a table of strings"),
        ({"__metadata__": "x", "a": tensor()}, 8, "__metadata__ is not a table of strings"),
        ({"\x1b[2J\ud800": tensor(dtype="?")}, 8, r"tensor '\x1b[2J\ud800': dtype"),
        (b'{"a": 1, "a": 2}', 0, "a is there twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', 0, "dtype is there twice"),
        (b'{"a": ', 0, "not JSON"),
        (b'{"\xff": 1}', 0, "not JSON"),
        (b'{"a": ' + b"[" * 100_000, 0, "not JSON"),
        (b'{"a": {"dtype": ' + b"[" * 300 + b"]" * 300 + b"}}", 0, "is unknown"),
        (b'{"a": ' + b"9" * 10_000 + b"}", 0, "not JSON"),
        ('{"a": {}}'.encode("utf-16-le"), 0, "not JSON"),
        (b'["a"]', 0, "byte 8 is b'['"),
    ],
)
def test_a_safetensors_header_with_a_fault_is_refused(
    tmp_path: Path, header: Any, data: int, word: str
) -> None:
    path = with_header(tmp_path / "a.safetensors", header, bytes(data))
    assert word in refusal(check_safetensors, path)


@pytest.mark.parametrize("num_bytes", [100_000_001, 2**40, 2**64 - 1])
def test_a_safetensors_header_beyond_the_bound_is_refused_without_reading_it(
    tmp_path: Path, num_bytes: int
) -> None:
    path = with_header(tmp_path / "a.safetensors", {"a": tensor()}, num_bytes=num_bytes)
    os.truncate(path, 200 * MIB)  # sparse: the bytes are there, none is on the disk
    used = peak_bytes(lambda: refusal(check_safetensors, path))
    assert f"a header of {num_bytes} bytes, at most 100000000" in refusal(check_safetensors, path)
    assert used < MIB


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_under_the_name_of_safetensors_is_called_a_pickle(tmp_path: Path, protocol: int) -> None:
    folder = make_folder(tmp_path / "m")
    path = folder / "model.safetensors"
    for content in ({}, {"weight": list(range(1000))}):
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        assert "not safetensors but a pickle: a pickle can run code" in refusal(
            check_model_files, path.parent
        )


def test_a_zip_under_the_name_of_safetensors_is_called_a_zip(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    with zipfile.ZipFile(folder / "model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    assert "not safetensors but a zip, as pickles come in: a pickle can run code" in refusal(
        check_model_files, folder
    )


def test_a_safetensors_file_whose_length_looks_like_a_pickle_still_passes(tmp_path: Path) -> None:
    text_of_header = json.dumps({"a": tensor()}).encode()
    header = text_of_header.ljust(0x0280)  # little-endian 80 02, as a pickle of protocol 2 begins
    path = with_header(tmp_path / "a.safetensors", header, bytes(8))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert check_safetensors(path) == {"a": ("F32", (2,))}


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"GGUF\3\0\0\0\0", "a GGUF file"),
    ],
)
def test_another_known_format_under_the_name_of_safetensors_is_named(
    tmp_path: Path, content: bytes, word: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert word in refusal(check_safetensors, path)


# --- GGUF


def test_a_good_gguf_file_passes_with_what_its_header_says(tmp_path: Path) -> None:
    info = check_gguf(make_gguf(tmp_path / "a.gguf"))
    assert (info.architecture, info.vocab_size) == ("llama", 3)
    assert info.tensors == {
        "token_embd.weight": ("F32", (4, 3)),
        "output_norm.weight": ("F32", (5,)),
        "blk.0.ffn_up.weight": ("Q8_0", (64, 2)),
    }
    assert info.metadata == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.tokens": ("STRING", 3),
        "tokenizer.ggml.token_type": ("INT32", 3),
    }


def test_gguf_shapes_are_given_in_the_order_of_the_arrays_that_were_written(tmp_path: Path) -> None:
    shapes = tensor_shapes(make_gguf(tmp_path / "a.gguf"))
    assert shapes == {"token_embd.weight": (3, 4), "output_norm.weight": (5,), "blk.0.ffn_up.weight": (2, 64)}


def test_every_kind_of_scalar_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    written: dict[str, Any] = {
        "uint8": 200,
        "uint16": 60_000,
        "uint32": 4_000_000_000,
        "uint64": 2**63 + 5,
        "int8": -100,
        "int16": -30_000,
        "int32": -2_000_000_000,
        "int64": -(2**62),
        "float32": 0.5,
        "float64": 0.1,
        "bool": True,
        "string": "é",
    }
    for kind, value in written.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert check_gguf(path).metadata == {"general.architecture": "llama"} | {
        f"x.{k}": v for k, v in written.items()
    }


def test_a_gguf_file_with_a_vocabulary_alone_is_read_and_is_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes([LLAMA, key("tokenizer.ggml.tokens", ARRAY, array(STRING, 1, text("a")))]))
    assert check_gguf(path).vocab_size == 1
    assert "0 tensors" in refusal(check_model_files, path)


def test_the_hand_written_layout_of_these_tests_is_a_good_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for version in (2, 3):
        path.write_bytes(gguf_bytes(tensors=[gguf_tensor()], data=bytes(32), version=version))
        assert check_gguf(path).tensors == {"w": ("F32", (8,))}
        assert [t.name for t in gguf.GGUFReader(path).tensors] == ["w"]


def test_an_alignment_that_the_file_sets_is_kept_to(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(256)
    for name in ("a", "b"):
        writer.add_tensor(name, np.ones(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert check_gguf(path).tensors == {"a": ("F32", (3,)), "b": ("F32", (3,))}


def test_every_truncation_of_a_gguf_file_is_refused_with_its_size(tmp_path: Path) -> None:
    whole = make_gguf(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for num_bytes in range(len(whole)):
        cut.write_bytes(whole[:num_bytes])
        said = refusal(check_gguf, cut)
        assert num_bytes < 4 or f"the file has {num_bytes}." in said, said
    assert f"ends early: its header needs {len(whole)} bytes" in said


def test_a_gguf_file_that_is_too_long_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "a.gguf")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0")
    assert f"too long: its header needs {size} bytes, the file has {size + 1}." in refusal(check_gguf, path)


HOSTILE = {
    "tensors": (gguf_bytes(num_tensors=2**60), "the number of tensors is 1152921504606846976"),
    "tensors-one-too-many": (
        gguf_bytes(tensors=[gguf_tensor()], num_tensors=2),
        "tensor '' starts at byte 0 of the data, not at 32",
    ),
    "key-values": (gguf_bytes(num_key_values=2**60), "the number of key/values is 1152921504606846976"),
    "key-length": (gguf_bytes([LLAMA, struct.pack("<QQQ", 2**62, 0, 0)]), "key 1 needs 4611686018427387"),
    "string-length": (
        gguf_bytes([LLAMA, key("x", STRING, struct.pack("<Q", 2**62))]),
        "the value of x needs 4611686018427387",
    ),
    "array-count": (
        gguf_bytes([LLAMA, key("x", ARRAY, array(UINT32, 2**61))]),
        "the length of the value of x is 2305843009213693952",
    ),
    "array-of-bytes": (
        gguf_bytes([LLAMA, key("x", ARRAY, array(0, 2**64 - 1))]),
        "the length of the value of x is 18446",
    ),
    "strings-count": (
        gguf_bytes([LLAMA, key("x", ARRAY, array(STRING, 2**61, text("a")))]),
        "the length of the value of x is 2305843",
    ),
    "strings-length": (
        gguf_bytes([LLAMA, key("x", ARRAY, array(STRING, 2, struct.pack("<QQ", 2**62, 0)))]),
        "the value of x needs 46116",
    ),
    "nested": (
        gguf_bytes([LLAMA, key("x", ARRAY, array(ARRAY, 1) * 20_000)]),
        "the value of x is an array of arrays",
    ),
    "name-length": (
        gguf_bytes(tensors=[struct.pack("<QQQ", 2**62, 0, 0)]),
        "the name of tensor 0 needs 4611686",
    ),
    "dimensions": (
        gguf_bytes(tensors=[text("w") + struct.pack("<IQQ", 2**32 - 1, 0, 0)]),
        "tensor w has 4294967295 dimensions",
    ),
    "elements": (
        gguf_bytes(tensors=[gguf_tensor(shape=(2**63,) * 4)], data=bytes(32)),
        "ends early: its header needs",
    ),
    "elements-wrap": (
        gguf_bytes(tensors=[gguf_tensor(shape=(2**62, 4))], data=bytes(32)),
        "ends early: its header needs",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_count_larger_than_the_file_is_refused_at_once(tmp_path: Path, case: str) -> None:
    content, word = HOSTILE[case]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    said = []
    assert peak_bytes(lambda: said.append(refusal(check_gguf, path))) < MIB
    assert word in said[0]


def test_the_49_bytes_that_make_the_gguf_reader_grow_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes([key("x", ARRAY, array(0, 2**60))]))
    assert path.stat().st_size == 49
    assert peak_bytes(lambda: refusal(check_gguf, path)) < MIB


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (gguf_bytes(version=1), "GGUF version 1; 2 and 3"),
        (gguf_bytes(version=0), "GGUF version 0; 2 and 3"),
        (gguf_bytes(version=3 << 24), "GGUF version 50331648 of a big-endian file; 2 and 3"),
        (gguf_bytes([]), "general.architecture is None, not a name"),
        (
            gguf_bytes([key("general.architecture", UINT32, bytes(4))]),
            "general.architecture is 0, not a name",
        ),
        (
            gguf_bytes([key("general.architecture", STRING, text(""))]),
            "general.architecture is '', not a name",
        ),
        (gguf_bytes([LLAMA, LLAMA]), "key general.architecture is there twice"),
        (gguf_bytes([LLAMA, key("x", 13, bytes(8))]), "the value of x has type 13; types 0 to 12 are known"),
        (gguf_bytes([LLAMA, key("x", ARRAY, array(77, 0))]), "the value of x has type 77"),
        (
            gguf_bytes([LLAMA, key("x", STRING, struct.pack("<Q", 2) + b"\xff\xfe")]),
            "the value of x is not UTF-8 at byte",
        ),
        (
            gguf_bytes([LLAMA, key("general.alignment", UINT32, struct.pack("<I", 0))]),
            "general.alignment is 0, not a power",
        ),
        (
            gguf_bytes([LLAMA, key("general.alignment", UINT32, struct.pack("<I", 24))]),
            "general.alignment is 24, not a",
        ),
        (
            gguf_bytes([LLAMA, key("general.alignment", STRING, text("32"))]),
            "general.alignment is '32', not a power",
        ),
        (gguf_bytes(tensors=[gguf_tensor(kind=4)], data=bytes(32)), "tensor w has ggml type 4, unknown here"),
        (
            gguf_bytes(tensors=[gguf_tensor(shape=(48,), kind=2)], data=bytes(32)),
            "rows of 48, Q4_0 packs blocks of 32",
        ),
        (
            gguf_bytes(tensors=[gguf_tensor(shape=(1,) * 5)], data=bytes(32)),
            "tensor w has 5 dimensions, at most 4",
        ),
        (
            gguf_bytes(tensors=[gguf_tensor(offset=32)], data=bytes(64)),
            "tensor w starts at byte 32 of the data, not at 0",
        ),
        (
            gguf_bytes(tensors=[gguf_tensor(), gguf_tensor("v")], data=bytes(64)),
            "tensor v starts at byte 0 of the data, not at 32",
        ),
        (
            gguf_bytes(tensors=[gguf_tensor(), gguf_tensor(offset=32)], data=bytes(64)),
            "tensor w is there twice",
        ),
        (b"GGML" + bytes(40), "a file that begins with b'GGML', not with b'GGUF'"),
        (b"", "a file that begins with b'', not with b'GGUF'"),
        (pickle.dumps({}), "a pickle: a pickle can run code"),
    ],
)
def test_a_gguf_header_with_a_fault_is_refused(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    assert word in refusal(check_gguf, path)


# --- damage


def flipped(whole: bytes, header_bytes: int, seed: int) -> list[bytes]:
    draw = random.Random(seed)
    copies = []
    for bit in draw.sample(range(8 * header_bytes), 300):
        copy = bytearray(whole)
        copy[bit // 8] ^= 1 << bit % 8
        copies.append(bytes(copy))
    return copies


def test_a_flipped_bit_in_a_safetensors_header_is_refused_or_harmless(tmp_path: Path) -> None:
    whole = make_safetensors(tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "flipped.safetensors"
    refused = 0
    for content in flipped(whole, 8 + int.from_bytes(whole[:8], "little"), seed=0):
        path.write_bytes(content)
        found: list[Any] = []
        try:
            assert peak_bytes(lambda: found.append(check_safetensors(path))) < MIB  # noqa: B023
        except UserError:
            refused += 1
            continue
        try:
            with safe_open(path, "np") as opened:
                assert set(opened.keys()) == set(found[0])
        except SafetensorError as error:
            pytest.fail(f"the library refuses what was passed: {error}: {content!r}")
    assert 100 < refused < 300


def test_a_flipped_bit_in_a_gguf_header_is_refused_or_harmless(tmp_path: Path) -> None:
    original = make_gguf(tmp_path / "whole.gguf")
    whole = original.read_bytes()
    header_bytes = gguf.GGUFReader(original).data_offset
    path = tmp_path / "flipped.gguf"
    refused = 0
    for content in flipped(whole, header_bytes, seed=0):
        path.write_bytes(content)
        found: list[Any] = []
        try:
            assert peak_bytes(lambda: found.append(check_gguf(path))) < MIB  # noqa: B023
        except UserError:
            refused += 1
            continue
        read = gguf.GGUFReader(path)
        assert {t.name: tuple(t.shape.tolist()) for t in read.tensors} == {
            n: s for n, (_, s) in found[0].tensors.items()
        }
        assert len(read.fields) == 3 + len(found[0].metadata)
    assert 100 < refused < 300


# --- folders


def test_a_whole_folder_passes_and_gives_its_shapes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    check_model_files(folder)
    assert tensor_shapes(folder) == {name: array.shape for name, array in ARRAYS.items()}


def test_a_sharded_folder_passes_and_gives_the_shapes_of_all_shards(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    check_model_files(folder)
    assert tensor_shapes(folder) == {name: array.shape for name, array in ARRAYS.items()}


def test_a_gguf_file_passes_as_a_model(tmp_path: Path) -> None:
    check_model_files(make_gguf(tmp_path / "m.gguf"))


def test_a_gguf_file_under_another_name_is_refused_because_loading_goes_by_the_name(tmp_path: Path) -> None:
    assert "a GGUF file whose name ends in '.bin'" in refusal(
        check_model_files, make_gguf(tmp_path / "m.bin")
    )


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in ("missing", "missing.gguf"):
        assert f"{name}: no such file" in refusal(check_model_files, tmp_path / name)
    for check in (tensor_shapes, file_sha256, folder_sha256, check_safetensors):
        assert "no such file" in refusal(check, tmp_path / "missing")


def test_a_folder_without_a_config_is_refused_with_what_was_found(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    needs = f"{folder}: not a model: a Hugging Face folder needs config.json; found: "
    assert refusal(check_model_files, folder).startswith(f"{needs}nothing.")
    for name in "cba":
        (folder / name).touch()
    assert refusal(check_model_files, folder).startswith(f"{needs}a, b, c.")
    for name in "hgfed2":
        (folder / name).touch()
    assert refusal(check_model_files, folder).startswith(f"{needs}2, a, b, c, d, e, f, g, and 1 more.")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "a JSON list, not an object"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"hidden_size": 4}', "neither model_type nor architectures"),
        (b'{"architectures": []}', "neither model_type nor architectures"),
        (b'{"model_type": "llama", "model_type": "gpt2"}', "model_type is there twice"),
    ],
)
def test_a_config_that_describes_no_model_is_refused(tmp_path: Path, content: bytes, word: str) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "config.json").write_bytes(content)
    said = refusal(check_model_files, folder)
    assert word in said and f"{folder / 'config.json'}: " in said


def test_a_config_with_architectures_alone_passes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    check_model_files(folder)


def test_a_folder_without_weights_is_refused_with_what_was_found(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "vocab.txt").touch()
    said = refusal(check_model_files, folder)
    assert f"{folder}: no weights; found: config.json, vocab.txt. Needed: model.safetensors" in said


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth", "last.ckpt"])
def test_a_folder_with_pickles_alone_is_refused_without_opening_them(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / name)
    assert f"{folder}: only {name}: a pickle can run code; convert to safetensors" in refusal(
        check_model_files, folder
    )


def test_a_folder_whose_weights_hold_no_tensor_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    with_header(folder / "model.safetensors", {})
    assert "hold 0 tensors" in refusal(check_model_files, folder)


def test_a_truncated_weight_file_in_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert f"{weights}: ends early" in refusal(check_model_files, folder)


def test_a_broken_link_in_place_of_the_weights_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "gone")
    assert "model.safetensors: no such file" in refusal(check_model_files, folder)


@pytest.mark.parametrize(("where", "call"), [(os, "listdir"), (Path, "open")], ids=["folder", "file"])
def test_what_the_system_refuses_to_read_is_told_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, call: str
) -> None:
    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    folder = make_folder(tmp_path / "m")
    monkeypatch.setattr(where, call, denied)
    assert "cannot be read: Permission denied" in refusal(check_model_files, folder)


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    index = folder / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    edit(fields)
    index.write_text(json.dumps(fields))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    (folder / "model-00002-of-00003.safetensors").unlink()
    said = refusal(check_model_files, folder)
    assert "1 of 3 shards" in said and "model-00002-of-00003.safetensors" in said


def test_a_tensor_that_its_shard_does_not_have_is_named(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    edit_index(folder, lambda f: f["weight_map"].update({"lost.weight": "model-00001-of-00003.safetensors"}))
    said = refusal(check_model_files, folder)
    assert (
        f"{folder / 'model-00001-of-00003.safetensors'}: 1 of 2 tensors" in said
        and "first lost.weight" in said
    )


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    both = {name: ARRAYS[name] for name in ("embed.weight", "norm.weight")}
    save_file(both, folder / "model-00002-of-00003.safetensors")
    said = refusal(check_model_files, folder)
    assert "tensor embed.weight is both in model-00001-of-00003.safetensors and in model-00002" in said


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "m")
    shard = folder / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard}: ends early" in refusal(check_model_files, folder)


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/outside.safetensors", "", "a.bin", "..", 7, None, ["a"]]
)
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path: Path, file: Any) -> None:
    folder = make_sharded(tmp_path / "m")
    make_safetensors(tmp_path / "outside.safetensors")
    edit_index(folder, lambda f: f["weight_map"].update({"norm.weight": file}))
    assert "tensor norm.weight is said to be in" in refusal(check_model_files, folder)


@pytest.mark.parametrize("file", ["a\0.safetensors", "a\n.safetensors"])
def test_a_shard_name_that_no_terminal_should_print_is_escaped(tmp_path: Path, file: str) -> None:
    folder = make_sharded(tmp_path / "m")
    edit_index(folder, lambda f: f["weight_map"].update({"norm.weight": file}))
    assert ascii(file) in refusal(check_model_files, folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, weight_map: Any) -> None:
    folder = make_sharded(tmp_path / "m")
    edit_index(folder, lambda f: f.update(weight_map=weight_map))
    assert "weight_map is not a table" in refusal(check_model_files, folder)


# --- hashes


def test_the_hash_of_a_file_is_the_sha256_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 5000)
    expected = hashlib.sha256(bytes(range(256)) * 5000).hexdigest()
    assert file_sha256(path) == folder_sha256(path) == expected


@pytest.mark.parametrize("make", [make_folder, make_sharded])
def test_the_hash_of_a_folder_covers_its_config_and_weights_and_nothing_else(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    folder = make(tmp_path / "m")
    names = ["config.json", *sorted(p.name for p in folder.glob("*.safetensors"))]
    lines = [f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n" for name in names]
    before = folder_sha256(folder)
    assert before == hashlib.sha256("".join(lines).encode()).hexdigest()
    (folder / "README.md").write_text("a model")
    assert folder_sha256(folder) == before
    for name in names:
        original = (folder / name).read_bytes()
        (folder / name).write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        assert folder_sha256(folder) != before
        (folder / name).write_bytes(original)
    assert folder_sha256(folder) == before


# --- the real one


@pytest.mark.real
def test_the_real_gguf_passes_and_says_the_same_as_the_reader_of_gguf() -> None:
    path = demo_gguf()
    if path is None:
        pytest.skip("real GGUF: the demo extra is not installed; not run")
    check_model_files(path)
    info = check_gguf(path)
    assert (info.architecture, info.vocab_size, len(info.tensors)) == ("llama", 49152, 272)
    assert tensor_shapes(path)["token_embd.weight"] == (49152, 576)
    read = gguf.GGUFReader(path)
    assert {t.name: (t.tensor_type.name, tuple(t.shape.tolist())) for t in read.tensors} == info.tensors
    scalars = {name: value for name, value in info.metadata.items() if not isinstance(value, tuple)}
    assert {name: read.fields[name].contents() for name in scalars} == scalars
    assert peak_bytes(lambda: check_gguf(path)) < MIB


@pytest.mark.real
@pytest.mark.parametrize("num_bytes", [4096, 1_000_000, 98_362_431])
def test_the_real_gguf_cut_short_is_refused_with_both_sizes(tmp_path: Path, num_bytes: int) -> None:
    source = demo_gguf()
    if source is None:
        pytest.skip("real GGUF: the demo extra is not installed; not run")
    path = tmp_path / "cut.gguf"
    with source.open("rb") as whole:
        path.write_bytes(whole.read(num_bytes))
    said = refusal(check_model_files, path)
    assert f"the file has {num_bytes}." in said
