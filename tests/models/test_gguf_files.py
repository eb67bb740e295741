"""GGUF headers: good ones pass with what they hold, faults are refused, false counts take no memory."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import demo_gguf
from weight_files import MIB, flipped, make_gguf, peak_bytes, refusal

from potstill.errors import UserError
from potstill.models.gguf_files import check_gguf
from potstill.models.model_files import check_model_files, tensor_shapes


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
