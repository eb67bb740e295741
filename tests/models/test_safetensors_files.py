"""safetensors headers: good ones pass with what they hold, faults are refused, false counts take no memory."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open
from weight_files import MIB, flipped, make_folder, make_safetensors, peak_bytes, refusal, with_header

from potstill.errors import UserError
from potstill.models.model_files import check_model_files
from potstill.models.safetensors_files import check_safetensors


def tensor(shape: Any = (2,), span: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


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
