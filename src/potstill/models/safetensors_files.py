"""Weight files, verified before any library opens them: Hugging Face folders, safetensors, GGUF.

A library that trusts a file's own counts can be made to allocate until memory ends, and a file that was cut
short or has a damaged header can load as something else. Every count and offset is compared here with the
bytes that are there; the tensors are not read. Refused: truncated and over-long files, headers that
contradict themselves, and pickles, which can run code. Damage inside a tensor's own bytes leaves no trace in
either format; only a hash shows it. Called by `load` before Transformers, and for shapes and hashes alone.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import reprlib
import struct
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from gguf.constants import GGML_QUANT_SIZES, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType

from potstill.errors import UserError
from potstill.io.hashing import file_sha256
from potstill.io.safe_open import MAX_JSON_BYTES, object_of, opened, read_object, require_plain
from potstill.io.safe_open import shown as _shown

Shape = tuple[int, ...]
Tensors = dict[str, tuple[str, Shape]]
Scalar = int | float | bool | str

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NO_PICKLE = "a pickle can run code; convert to safetensors"
AGAIN = "Fetch or export it again."
MODEL_IS = "A model is a Hugging Face folder or a GGUF file."
MAX_DIMS, GGML_MAX_DIMS = 64, 4
# Beside config.json; Transformers takes a damaged one of some of them for a missing one.
SETTINGS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

SAFETENSORS_BITS = {
    **dict.fromkeys(("F4",), 4) | dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 8),
    **dict.fromkeys(("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16) | dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
WHOLE = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}
# struct's code for each type in the enum's order; _ stands for strings and arrays, which have none.
GGUF_CODES = dict(zip(GGUFValueType, "BbHhIif?__Qqd", strict=True))
# The least that each takes in the file: a count that the remaining bytes cannot hold is a lie.
STRING_BYTES, KEY_VALUE_BYTES, TENSOR_BYTES = 8, 13, 24


@dataclass(frozen=True, slots=True)
class GGUFInfo:
    """What stands before the weights of a GGUF file."""

    architecture: str
    tensors: Tensors
    """ggml type and shape as written: the fastest-running dimension first, the reverse of PyTorch."""
    metadata: dict[str, Scalar | tuple[str, int]]
    """An array is given as the type and number of its elements."""
    vocab_size: int | None
    """Length of the token list, None for a file without a tokenizer."""


def check_model_files(source: Path) -> None:
    """Nothing for a folder or GGUF file that holds a whole model; else a UserError that names the file."""
    if os.path.isdir(source):
        require_plain(source, AGAIN)
        if "config.json" not in (names := _names(source)):
            needs = f"a Hugging Face folder needs config.json; found: {_listed(names)}"
            _refuse(source, f"not a model: {needs}", MODEL_IS)
        config = read_object(source / "config.json", AGAIN)
        if not (config.get("model_type") or config.get("architectures")):
            what = "neither model_type nor architectures is set"
            _refuse(source / "config.json", what, "Take the config that came with the model.")
        for name in SETTINGS:
            if os.path.lexists(source / name):
                read_object(source / name, AGAIN)
        _require_floats(source, config)
    if not tensor_shapes(source):
        _refuse(source, "its weight files hold 0 tensors")
    if not os.path.isdir(source):
        if source.suffix != ".gguf":
            _refuse(source, f"a GGUF file whose name ends in '{source.suffix}'", "Let it end in .gguf.")
        require_layers(source)


def tensor_shapes(source: Path) -> dict[str, Shape]:
    """Shape of every tensor in PyTorch's order, from the verified headers of a folder or a GGUF file."""
    if not os.path.isdir(source):
        return {name: shape[::-1] for name, (_, shape) in check_gguf(source).tensors.items()}
    shapes: dict[str, Shape] = {}
    home: dict[str, str] = {}
    for file, promised in _weight_files(source).items():
        found = check_safetensors(source / file)
        if missing := sorted(promised - found.keys()):
            count = f"{len(missing)} of {len(promised)} tensors that {INDEX} says it has are missing"
            _refuse(source / file, f"{count}, first {_shown(missing[0])}")
        for name, (_, shape) in found.items():
            if name in home:
                _refuse(source, f"tensor {_shown(name)} is both in {home[name]} and in {file}")
            home[name], shapes[name] = file, shape
    return shapes


def folder_sha256(source: Path) -> str:
    """A file's sha256; for a folder, that of the lines `name sha256` of its config and weights, sorted."""
    if not os.path.isdir(source):
        return file_sha256(source)
    names = sorted(["config.json", *_weight_files(source)])
    lines = "".join(f"{name} {file_sha256(source / name)}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def check_safetensors(path: Path) -> Tensors:
    """dtype and shape of every tensor, when header and file agree to the byte."""
    with _reading(path, "safetensors") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(9)
        header_bytes = int.from_bytes(start[:8], "little")
        if start[8:] != b"{" or header_bytes > min(size - 8, MAX_JSON_BYTES):
            _refuse_safetensors(path, start, header_bytes, size)
        file.seek(8)
        header = object_of(file.read(header_bytes), str(path), AGAIN)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "__metadata__ is not a table of strings")
    tensors: Tensors = {}
    spans = []
    for name, entry in header.items():
        tensors[name], first, last = _safetensors_entry(f"{path}: tensor {_shown(name)}", entry)
        spans.append((first, last, name))
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            _refuse(path, f"tensor {_shown(name)} starts at byte {first} of the data, not at {end}")
        end = last
    _require_size(path, 8 + header_bytes + end, size)
    return tensors


def check_gguf(path: Path) -> GGUFInfo:
    """What the header says, when it and every tensor's place agree with the file's size."""
    with _reading(path) as file:
        start = file.read(9)
        if start[:4] != GGUF_MAGIC.to_bytes(4, "little"):
            what = _kind(start) or f"a file that begins with {start[:4]!r}, not with b'GGUF'"
            _refuse(path, f"not a model but {what}", MODEL_IS)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _walk_gguf(_Cursor(path, data))


def require_layers(path: Path) -> None:
    """Transformers builds as many layers as the file says, before it looks for their tensors, and passes over
    tensors of layers beyond.
    """
    info = check_gguf(path)
    key = f"{info.architecture}.block_count"
    count = info.metadata.get(key)
    if type(count) is not int or not 1 <= count <= len(info.tensors):
        _refuse(path, f"{key} is {reprlib.repr(count)}, with {len(info.tensors)} tensors in the file")
    numbers = (name.split(".")[1] for name in info.tensors if name.startswith("blk."))
    last = max((int(number) for number in numbers if number.isdecimal()), default=0)
    if last >= count:
        _refuse(path, f"{key} is {count}, and there is a tensor of layer {last}, counted from 0")


def _require_floats(folder: Path, config: dict[str, Any]) -> None:
    """Whole numbers are weights only where the config says how they were quantised; else they are cast."""
    for file in _weight_files(folder) if "quantization_config" not in config else ():
        for name, (dtype, _) in check_safetensors(folder / file).items():
            if name.endswith(".weight") and dtype in WHOLE:
                _refuse(folder / file, f"tensor {_shown(name)} is of whole numbers ({dtype})")


def _weight_files(folder: Path) -> dict[str, set[str]]:
    """File name -> tensors that the index promises there; a single file wins, as in Transformers."""
    names = _names(folder)
    if SINGLE in names:
        return {SINGLE: set()}
    if INDEX not in names:
        pickles = [name for name in names if name.endswith(PICKLES)]
        what = f"only {pickles[0]}: {NO_PICKLE}" if pickles else f"no weights; found: {_listed(names)}"
        _refuse(folder, what, f"Needed: {SINGLE}, or {INDEX} and its shards.")
    index = folder / INDEX
    weight_map = read_object(index, AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _refuse(index, "weight_map is not a table of tensor name to file")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # A path such as ../x would have us open what is not part of the model.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            where = f"tensor {_shown(name)} is said to be in {reprlib.repr(file)}"
            _refuse(index, f"{where}, not the name of a .safetensors file beside it")
        shards.setdefault(file, set()).add(name)
    if missing := sorted(shards.keys() - set(names)):
        count = f"{len(missing)} of {len(shards)} shards"
        _refuse(folder, f"{count} named by {INDEX} are missing, first {_shown(missing[0])}")
    return dict(sorted(shards.items()))


def _kind(start: bytes) -> str:
    """What a file is that pretends to be weights, by its first bytes; empty when they say nothing."""
    known = {b"version ": "a Git LFS pointer", b"GGUF": "a GGUF file"}
    return next((kind for first, kind in known.items() if start.startswith(first)), "")


def _refuse_safetensors(path: Path, start: bytes, header_bytes: int, size: int) -> NoReturn:
    if kind := _kind(start):
        _refuse(path, f"not safetensors but {kind}")
    if header_bytes > MAX_JSON_BYTES:
        _refuse(path, f"not safetensors: a header of {header_bytes} bytes, at most {MAX_JSON_BYTES} can be")
    _require_size(path, max(size, 8 + max(header_bytes, 2)), size)
    _refuse(path, f"not safetensors: byte 8 is {start[8:]!r}, where the header begins with b'{{'")


def _safetensors_entry(where: str, entry: Any) -> tuple[tuple[str, Shape], int, int]:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_BITS:
        _refuse(where, f"dtype {reprlib.repr(dtype)} is unknown", f"Known: {', '.join(SAFETENSORS_BITS)}.")
    # The bounds keep a hostile product of dimensions from becoming a number of a million digits.
    if not _is_naturals(shape) or len(shape) > MAX_DIMS:
        _refuse(where, f"shape {reprlib.repr(shape)} is not a list of at most {MAX_DIMS} sizes")
    if not _is_naturals(span) or len(span) != 2:
        _refuse(where, f"data_offsets {reprlib.repr(span)} are not two byte positions")
    bits, bits_there = math.prod(shape) * SAFETENSORS_BITS[dtype], 8 * (span[1] - span[0])
    if bits != bits_there:
        _refuse(where, f"{dtype} {shape} takes {bits} bits, its data_offsets give {bits_there}")
    return (dtype, tuple(shape)), span[0], span[1]


def _is_naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


class _Cursor:
    """A place in a mapped file that never moves past the end, nor reads there."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def take(self, num_bytes: int, what: str) -> int:
        """Where the next `num_bytes` begin; the cursor moves behind them."""
        start, end = self.at, self.at + num_bytes
        if end > self.size:
            _refuse(self.path, f"ends early: {what} needs {end} bytes, the file has {self.size}")
        self.at = end
        return start

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.take(struct.calcsize(f"<{code}"), what))[0]

    def text(self, what: str) -> str:
        start = self.take(self.scalar("Q", what), what)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            _refuse(self.path, f"{what} is not UTF-8 at byte {start + error.start}")

    def count(self, smallest: int, what: str) -> int:
        """A number of things of at least `smallest` bytes each, as many as the rest of the file can hold."""
        count: int = self.scalar("Q", what)
        if (least := self.at + count * smallest) > self.size:
            _refuse(self.path, f"{what} is {count}, which needs {least} bytes, the file has {self.size}")
        return count

    def value_type(self, what: str) -> GGUFValueType:
        number = self.scalar("I", what)
        if number not in GGUFValueType._value2member_map_:
            _refuse(self.path, f"{what} has type {number}; types 0 to {len(GGUFValueType) - 1} are known")
        return GGUFValueType(number)


def _walk_gguf(cursor: _Cursor) -> GGUFInfo:
    path = cursor.path
    cursor.take(4, "the magic")
    version = cursor.scalar("I", "the version")
    if version not in (2, 3):
        other = " of a big-endian file" if version and not version & 0xFFFF else ""
        _refuse(path, f"GGUF version {version}{other}; 2 and 3, little-endian, are read", "Convert it again.")
    num_tensors = cursor.count(TENSOR_BYTES, "the number of tensors")
    num_key_values = cursor.count(KEY_VALUE_BYTES, "the number of key/values")
    metadata: dict[str, Scalar | tuple[str, int]] = {}
    for number in range(num_key_values):
        key = cursor.text(f"key {number}")
        if key in metadata:
            _refuse(path, f"key {_shown(key)} is there twice")
        metadata[key] = _read_value(cursor, f"the value of {_shown(key)}")
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        _refuse(
            path, f"not a model: general.architecture is {reprlib.repr(architecture)}, not a name", MODEL_IS
        )
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        _refuse(path, f"general.alignment is {reprlib.repr(alignment)}, not a power of two")
    tensors: Tensors = {}
    end = 0
    for number in range(num_tensors):
        name = cursor.text(f"the name of tensor {number}")
        if name in tensors:
            _refuse(path, f"tensor {_shown(name)} is there twice")
        ggml_type, shape, offset, num_bytes = _read_tensor_info(cursor, f"tensor {_shown(name)}")
        # ggml writes and demands this order, padding included: a gap or an overlap is a damaged header.
        if offset != end:
            _refuse(path, f"tensor {_shown(name)} starts at byte {offset} of the data, not at {end}")
        end += num_bytes + -num_bytes % alignment
        tensors[name] = ggml_type, shape
    if tensors:
        _require_size(path, cursor.at + -cursor.at % alignment + end, cursor.size)
    tokens = metadata.get("tokenizer.ggml.tokens")
    return GGUFInfo(architecture, tensors, metadata, tokens[1] if isinstance(tokens, tuple) else None)


def _read_value(cursor: _Cursor, what: str) -> Any:
    value_type = cursor.value_type(what)
    if value_type is GGUFValueType.STRING:
        return cursor.text(what)
    if value_type is not GGUFValueType.ARRAY:
        return cursor.scalar(GGUF_CODES[value_type], what)
    element = cursor.value_type(what)
    if element is GGUFValueType.ARRAY:
        # ggml refuses them too; read by recursion, a small file of them overflows the stack.
        _refuse(cursor.path, f"{what} is an array of arrays, which no model has")
    is_string = element is GGUFValueType.STRING
    width = STRING_BYTES if is_string else struct.calcsize(f"<{GGUF_CODES[element]}")
    length = cursor.count(width, f"the length of {what}")
    if is_string:
        for _ in range(length):
            cursor.take(cursor.scalar("Q", what), what)
    else:
        cursor.take(length * width, what)
    return element.name, length


def _read_tensor_info(cursor: _Cursor, what: str) -> tuple[str, Shape, int, int]:
    """ggml type, shape as written, offset into the data and length there in bytes."""
    num_dims = cursor.scalar("I", what)
    if num_dims > GGML_MAX_DIMS:
        _refuse(cursor.path, f"{what} has {num_dims} dimensions, at most {GGML_MAX_DIMS} are possible")
    shape = tuple(cursor.scalar("Q", what) for _ in range(num_dims))
    number = cursor.scalar("I", what)
    if number not in GGMLQuantizationType._value2member_map_:
        _refuse(cursor.path, f"{what} has ggml type {number}, unknown here", "Quantise it to a common type.")
    ggml_type = GGMLQuantizationType(number)
    block, block_bytes = GGML_QUANT_SIZES[ggml_type]
    row = shape[0] if shape else 1
    if row % block:
        _refuse(cursor.path, f"{what} has rows of {row}, {ggml_type.name} packs blocks of {block}")
    return ggml_type.name, shape, cursor.scalar("Q", what), math.prod(shape) // block * block_bytes


def _reading(path: Path, wanted: str = "a model") -> AbstractContextManager[BufferedReader]:
    return opened(path, wanted, AGAIN if os.path.lexists(path) else MODEL_IS)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        _refuse(folder, f"cannot be read: {error.strerror}", "Change its permissions or copy it.")


def _listed(names: list[str]) -> str:
    more = [f"and {len(names) - 8} more"] if len(names) > 8 else []
    return ", ".join([*map(_shown, names[:8]), *more]) or "nothing"


def _require_size(path: Path, needed: int, size: int) -> None:
    if needed != size:
        fault = "ends early" if size < needed else "too long"
        _refuse(path, f"{fault}: its header needs {needed} bytes, the file has {size}")


def _refuse(where: object, what: str, todo: str = AGAIN) -> NoReturn:
    raise UserError(f"{where}: {what}. {todo}")
