"""The header of a GGUF file, compared with the bytes that are there before any library opens it.

A library that trusts a file's own counts can be made to allocate until memory ends, and a file that was cut
short can load as something else. The tensors are not read: damage inside their bytes shows only in a hash.
"""

from __future__ import annotations

import math
import mmap
import os
import reprlib
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from gguf.constants import GGML_QUANT_SIZES, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType

from potstill.io.gguf_library import Reader
from potstill.io.safe_open import FETCH_AGAIN, LFS_POINTER, opened, printable_name, refuse, require_size

Shape = tuple[int, ...]
Scalar = int | float | bool | str

MODEL_IS = "A model is a Hugging Face folder or a GGUF file."
FOLDER = "Use the folder that it was converted from."
MAX_DIMS = 4
# struct's code for each type in the enum's order; _ stands for strings and arrays, which have none.
CODES = dict(zip(GGUFValueType, "BbHhIif?__Qqd", strict=True))
# The least that each takes in the file: a count that the remaining bytes cannot hold is refused.
MIN_STRING_BYTES, MIN_KEY_VALUE_BYTES, MIN_TENSOR_BYTES = 8, 13, 24


@dataclass(frozen=True, slots=True)
class GGUFInfo:
    """What the header of a GGUF file holds."""

    architecture: str
    tensors: dict[str, tuple[str, Shape]]
    """ggml type and shape as written: the fastest-running dimension first, the reverse of PyTorch."""
    metadata: dict[str, Scalar | tuple[str, int]]
    """An array is given as the type and number of its elements."""
    vocab_size: int | None
    """Length of the token list, None for a file without a tokenizer."""


@dataclass
class GGUFModel:
    """A file whose header is good, and the values of it that the header alone does not give."""

    path: Path
    info: GGUFInfo

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.path)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of the architecture, an array as a list."""
        name = f"{self.info.architecture}.{key}"
        value = self.info.metadata.get(name, default)
        return self.reader.get_field(name).contents() if isinstance(value, tuple) else value

    def numbers(self, tensor: str) -> list[float] | None:
        """Those of a small tensor; None where the file does not have it."""
        if tensor not in self.info.tensors:
            return None
        (found,) = (each for each in self.reader.tensors if each.name == tensor)
        return [float(each) for each in found.data.flatten()]

    def refuse(self, what: str) -> NoReturn:
        refuse(self.path, what, FOLDER)


def check_gguf(path: Path) -> GGUFInfo:
    """What the header says, when it and every tensor's place agree with the file's size."""
    with opened(path, "a model", FETCH_AGAIN if os.path.lexists(path) else MODEL_IS) as file:
        start = file.read(9)
        if start[:4] != GGUF_MAGIC.to_bytes(4, "little"):
            begins = f"a file that begins with {start[:4]!r}, not with b'GGUF'"
            what = "a Git LFS pointer" if start.startswith(LFS_POINTER) else begins
            refuse(path, f"not a model but {what}", MODEL_IS)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_header(_Cursor(path, data))


def require_layers(path: Path) -> None:
    """Refuse a layer count that the tensors contradict: Transformers builds as many layers as the file says
    before it looks for their tensors, and ignores tensors of layers beyond. And sizes of 0, which it divides by.
    """
    info = check_gguf(path)
    key = f"{info.architecture}.block_count"
    count = info.metadata.get(key)
    if type(count) is not int or not 1 <= count <= len(info.tensors):
        refuse(path, f"{key} is {reprlib.repr(count)}, with {len(info.tensors)} tensors in the file")
    has_states = any(
        name.startswith(f"{info.architecture}.ssm.") for name in info.metadata
    )  # Mamba: no heads
    for size in () if has_states else ("embedding_length", "attention.head_count", "attention.head_count_kv"):
        if info.metadata.get(f"{info.architecture}.{size}") == 0:
            refuse(path, f"{info.architecture}.{size} is 0")
    numbers = (name.split(".")[1] for name in info.tensors if name.startswith("blk."))
    last = max((int(number) for number in numbers if number.isdecimal()), default=0)
    if last >= count:
        refuse(path, f"{key} is {count}, and there is a tensor of layer {last}, counted from 0")


class _Cursor:
    """A place in a mapped file that never moves past the end, nor reads there."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def take(self, num_bytes: int, what: str) -> int:
        """Where the next `num_bytes` begin; the cursor moves behind them."""
        start, end = self.at, self.at + num_bytes
        if end > self.size:
            refuse(self.path, f"ends early: {what} needs {end} bytes, the file has {self.size}")
        self.at = end
        return start

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.take(struct.calcsize(f"<{code}"), what))[0]

    def text(self, what: str) -> str:
        start = self.take(self.scalar("Q", what), what)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            refuse(self.path, f"{what} is not UTF-8 at byte {start + error.start}")

    def skip_texts(self, count: int, what: str) -> None:
        """Move behind so many texts: one loop, as a vocabulary and its merges are a hundred thousand."""
        at, length_at = self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            end = at + 8
            if end <= self.size:
                end += length_at(self.data, at)[0]
            if end > self.size:
                refuse(self.path, f"ends early: {what} needs {end} bytes, the file has {self.size}")
            at = end
        self.at = at

    def count(self, smallest: int, what: str) -> int:
        """A number of things of at least `smallest` bytes each, as many as the rest of the file can hold."""
        count: int = self.scalar("Q", what)
        if (least := self.at + count * smallest) > self.size:
            refuse(self.path, f"{what} is {count}, which needs {least} bytes, the file has {self.size}")
        return count

    def value_type(self, what: str) -> GGUFValueType:
        number = self.scalar("I", what)
        if number not in GGUFValueType._value2member_map_:
            refuse(self.path, f"{what} has type {number}; types 0 to {len(GGUFValueType) - 1} are known")
        return GGUFValueType(number)


def _read_header(cursor: _Cursor) -> GGUFInfo:
    path = cursor.path
    cursor.take(4, "the magic")
    version = cursor.scalar("I", "the version")
    if version not in (2, 3):
        other = " of a big-endian file" if version and not version & 0xFFFF else ""
        refuse(path, f"GGUF version {version}{other}; 2 and 3, little-endian, are read", "Convert it again.")
    num_tensors = cursor.count(MIN_TENSOR_BYTES, "the number of tensors")
    num_key_values = cursor.count(MIN_KEY_VALUE_BYTES, "the number of key/values")
    metadata: dict[str, Scalar | tuple[str, int]] = {}
    for number in range(num_key_values):
        key = cursor.text(f"key {number}")
        if key in metadata:
            refuse(path, f"key {printable_name(key)} is there twice")
        metadata[key] = _read_value(cursor, f"the value of {printable_name(key)}")
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        refuse(
            path, f"not a model: general.architecture is {reprlib.repr(architecture)}, not a name", MODEL_IS
        )
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        refuse(path, f"general.alignment is {reprlib.repr(alignment)}, not a power of two")
    tensors: dict[str, tuple[str, Shape]] = {}
    end = 0
    for number in range(num_tensors):
        name = cursor.text(f"the name of tensor {number}")
        if name in tensors:
            refuse(path, f"tensor {printable_name(name)} is there twice")
        ggml_type, shape, offset, num_bytes = _read_tensor_info(cursor, f"tensor {printable_name(name)}")
        # ggml writes and demands this order, padding included: a gap or an overlap is a damaged header.
        if offset != end:
            refuse(path, f"tensor {printable_name(name)} starts at byte {offset} of the data, not at {end}")
        end += num_bytes + -num_bytes % alignment
        tensors[name] = ggml_type, shape
    if tensors:
        require_size(path, cursor.at + -cursor.at % alignment + end, cursor.size)
    tokens = metadata.get("tokenizer.ggml.tokens")
    return GGUFInfo(architecture, tensors, metadata, tokens[1] if isinstance(tokens, tuple) else None)


def _read_value(cursor: _Cursor, what: str) -> Any:
    value_type = cursor.value_type(what)
    if value_type is GGUFValueType.STRING:
        return cursor.text(what)
    if value_type is not GGUFValueType.ARRAY:
        return cursor.scalar(CODES[value_type], what)
    element = cursor.value_type(what)
    if element is GGUFValueType.ARRAY:
        # ggml refuses them too; read by recursion, a small file of them overflows the stack.
        refuse(cursor.path, f"{what} is an array of arrays, which no model has")
    is_string = element is GGUFValueType.STRING
    width = MIN_STRING_BYTES if is_string else struct.calcsize(f"<{CODES[element]}")
    length = cursor.count(width, f"the length of {what}")
    if is_string:
        cursor.skip_texts(length, what)
    else:
        cursor.take(length * width, what)
    return element.name, length


def _read_tensor_info(cursor: _Cursor, what: str) -> tuple[str, Shape, int, int]:
    """ggml type, shape as written, offset into the data and length there in bytes."""
    num_dims = cursor.scalar("I", what)
    if num_dims > MAX_DIMS:
        refuse(cursor.path, f"{what} has {num_dims} dimensions, at most {MAX_DIMS} are possible")
    shape = tuple(cursor.scalar("Q", what) for _ in range(num_dims))
    number = cursor.scalar("I", what)
    if number not in GGMLQuantizationType._value2member_map_:
        refuse(cursor.path, f"{what} has ggml type {number}, unknown here", "Quantise it to a common type.")
    ggml_type = GGMLQuantizationType(number)
    block, block_bytes = GGML_QUANT_SIZES[ggml_type]
    row = shape[0] if shape else 1
    if row % block:
        refuse(cursor.path, f"{what} has rows of {row}, {ggml_type.name} packs blocks of {block}")
    return ggml_type.name, shape, cursor.scalar("Q", what), math.prod(shape) // block * block_bytes
