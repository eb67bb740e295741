"""The header of a safetensors file, compared with the bytes that are there before any library opens it.

Refused: truncated and over-long files, headers that contradict themselves, and other formats under this name.
The tensors are not read: damage inside their bytes shows only in a hash.
"""

from __future__ import annotations

import math
import os
import reprlib
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from potstill.io.safe_open import (
    FETCH_AGAIN,
    LFS_POINTER,
    MAX_JSON_BYTES,
    object_of,
    opened,
    printable_name,
    refuse,
    require_size,
)

Shape = tuple[int, ...]
Tensors = dict[str, tuple[str, Shape]]

MAX_DIMS = 64
BITS = {
    **dict.fromkeys(("F4",), 4) | dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 8),
    **dict.fromkeys(("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16) | dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


def check_safetensors(path: Path) -> Tensors:
    """dtype and shape of every tensor, when header and file agree to the byte."""
    with opened(path, "safetensors", FETCH_AGAIN) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(9)
        header_bytes = int.from_bytes(start[:8], "little")
        if start[8:] != b"{" or header_bytes > min(size - 8, MAX_JSON_BYTES):
            _refuse_header(path, start, header_bytes, size)
        file.seek(8)
        header = object_of(file.read(header_bytes), str(path), FETCH_AGAIN)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse(path, "__metadata__ is not a table of strings")
    tensors: Tensors = {}
    spans = []
    for name, entry in header.items():
        tensors[name], first, last = _entry(f"{path}: tensor {printable_name(name)}", entry)
        spans.append((first, last, name))
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            refuse(path, f"tensor {printable_name(name)} starts at byte {first} of the data, not at {end}")
        end = last
    require_size(path, 8 + header_bytes + end, size)
    return tensors


def _refuse_header(path: Path, start: bytes, header_bytes: int, size: int) -> NoReturn:
    for first, other in ((LFS_POINTER, "a Git LFS pointer"), (b"GGUF", "a GGUF file")):
        if start.startswith(first):
            refuse(path, f"not safetensors but {other}")
    if header_bytes > MAX_JSON_BYTES:
        refuse(path, f"not safetensors: a header of {header_bytes} bytes, at most {MAX_JSON_BYTES} can be")
    require_size(path, max(size, 8 + max(header_bytes, 2)), size)
    refuse(path, f"not safetensors: byte 8 is {start[8:]!r}, where the header begins with b'{{'")


def _entry(where: str, entry: Any) -> tuple[tuple[str, Shape], int, int]:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        refuse(where, f"dtype {reprlib.repr(dtype)} is unknown", f"Known: {', '.join(BITS)}.")
    # The bounds keep a hostile product of dimensions from becoming a number of a million digits.
    if not _is_naturals(shape) or len(shape) > MAX_DIMS:
        refuse(where, f"shape {reprlib.repr(shape)} is not a list of at most {MAX_DIMS} sizes")
    if not _is_naturals(span) or len(span) != 2:
        refuse(where, f"data_offsets {reprlib.repr(span)} are not two byte positions")
    bits, bits_there = math.prod(shape) * BITS[dtype], 8 * (span[1] - span[0])
    if bits != bits_there:
        refuse(where, f"{dtype} {shape} takes {bits} bits, its data_offsets give {bits_there}")
    return (dtype, tuple(shape)), span[0], span[1]


def _is_naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
