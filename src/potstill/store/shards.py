"""One file of a store: rows of targets in a safetensors file, with a hash for each mebibyte of it.

    rows      int64 [R]           numbers of the rows
    places    uint8 [R, T / 8]    which places in a row have targets: bit t % 8 of byte t // 8
    offsets   int64 [R + 1, A]    where each row begins in the A tensors below, in order of their names
    ...       the tensors of the codec, those of the rows one after the other

safetensors does not notice a flipped bit: each block is hashed when it is first read, and a damaged one is
refused before a number of it is used. A file is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from potstill.errors import UserError
from potstill.io.atomic import write_whole
from potstill.io.safe_open import opened, unreadable
from potstill.models.safetensors_files import check_safetensors

BLOCK_BYTES = 2**20
INDEX = ("rows", "places", "offsets")
AGAIN = "Capture the targets again, or fetch the store again."
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
}


@dataclass(frozen=True)
class FileRecord:
    """What a manifest has of a file: its name, its size, and hashes of the whole and of each block."""

    file: str
    bytes: int
    sha256: str
    blocks: list[str]
    """Hash of each block of BLOCK_BYTES."""

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        whole, blocks, total = hashlib.sha256(), [], 0
        with opened(path, "a file of targets", AGAIN) as file:
            while block := file.read(BLOCK_BYTES):
                whole.update(block)
                blocks.append(block_hash(block))
                total += len(block)
        return cls(path.name, total, whole.hexdigest(), blocks)

    @classmethod
    def parse(cls, entry: Any, place: Path) -> FileRecord:
        """A record out of the JSON file at `place`.

        Raises:
            UserError: fields missing or unknown, too few hashes for the size, or a name with a folder in it,
                which would lead out of the store.
        """
        try:
            record = cls(**entry)
            is_sound = len(record.blocks) == -(-record.bytes // BLOCK_BYTES) > 0 and all(
                isinstance(block, str) for block in record.blocks
            )
        except TypeError:
            is_sound = False
        if not is_sound or Path(record.file).name != record.file:
            raise UserError(f"{place}: damaged: no record of a file: {entry!r:.80}. {AGAIN}")
        return record


def block_hash(block: bytes | memoryview) -> str:
    return hashlib.blake2b(block, digest_size=16).hexdigest()


def write_shard(
    path: Path, rows: Sequence[int], places: Sequence[Tensor], encoded: Sequence[dict[str, Tensor]], T: int
) -> FileRecord:
    """Write rows of targets as one file.

    Args:
        rows: their numbers over both splits.
        places: of each row, the places in it that have targets, places_P in int64.
        encoded: of each row, the tensors that the codec made of its P positions; all have the same names.
        T: tokens in a row.
    """
    names = sorted(encoded[0])
    ends = [[0] * len(names)]
    for row in encoded:
        ends.append([end + len(row[name]) for end, name in zip(ends[-1], names, strict=True)])
    has_targets = np.zeros((len(rows), -(-T // 8) * 8), dtype=np.uint8)
    for number, places_P in enumerate(places):
        has_targets[number, places_P.numpy()] = 1
    tensors = {
        "rows": torch.tensor(list(rows), dtype=torch.int64),
        "places": torch.from_numpy(np.packbits(has_targets, axis=1, bitorder="little")),
        "offsets": torch.tensor(ends, dtype=torch.int64),
    } | {name: torch.cat([row[name] for row in encoded]) for name in names}
    write_whole(path, safetensors.torch.save(tensors))
    return FileRecord.of(path)


class VerifiedFile:
    """Tensors of a safetensors file, read in slices; each block is hashed when it is first read.

    Nothing is held open between reads: a store may have more files than a process may open.

    Raises:
        UserError: another size than recorded, or a damaged header.
    """

    def __init__(self, path: Path, record: FileRecord) -> None:
        require_size(path, record)
        size = record.bytes
        self.path, self.record = path, record
        self._is_sound = bytearray(len(record.blocks))
        header_bytes = int.from_bytes(self.bytes(0, 8), "little")
        if not 0 < header_bytes <= size - 8:
            raise UserError(f"{path}: damaged: its header has {header_bytes} of {size} bytes. {AGAIN}")
        # Its hashes are compared before JSON is parsed, and offsets are checked before one is followed.
        header: dict[str, Any] = json.loads(self.bytes(8, 8 + header_bytes))
        check_safetensors(path)
        self._start = 8 + header_bytes
        self.header = {name: entry for name, entry in header.items() if name != "__metadata__"}

    def bytes(self, first: int, last: int) -> bytearray:
        """Bytes `first` to `last` of the file, verified; UserError where a block is damaged."""
        blocks = range(first // BLOCK_BYTES, -(-last // BLOCK_BYTES))
        begin, end = first, last
        # A hash is of a whole block: read the blocks whole once, and afterwards only the bytes themselves.
        if not all(self._is_sound[blocks.start : blocks.stop]):
            begin, end = blocks.start * BLOCK_BYTES, min(blocks.stop * BLOCK_BYTES, self.record.bytes)
        try:
            with self.path.open("rb") as file:
                file.seek(begin)
                data = bytearray(file.read(end - begin))
        except OSError as error:
            raise unreadable(self.path, error, AGAIN) from error
        if len(data) < end - begin:
            raise UserError(f"{self.path}: ends at byte {begin + len(data)}, {end} are wanted. {AGAIN}")
        for number in blocks:
            if not self._is_sound[number]:
                at = number * BLOCK_BYTES - begin
                self._require_sound(number, memoryview(data)[at : at + BLOCK_BYTES])
        return data[first - begin : last - begin]

    def _require_sound(self, number: int, block: memoryview) -> None:
        if block_hash(block) != self.record.blocks[number]:
            first = number * BLOCK_BYTES
            raise UserError(
                f"{self.path}: damaged: block {number} (bytes {first} to {first + len(block) - 1}) is not"
                f" what was written. {AGAIN}"
            )
        self._is_sound[number] = 1

    def tensor(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Entries `first` to `last` of a tensor along its first dimension, all of it by default."""
        entry = self.header[name]
        dtype, shape = TORCH_DTYPES.get(entry["dtype"]), entry["shape"]
        last = shape[0] if last is None and shape else last
        if dtype is None or last is None or not 0 <= first <= last <= shape[0]:
            raise UserError(
                f"{self.path}: no file of targets: {name} is {entry['dtype']} {shape}, entries {first} to"
                f" {last} are wanted. {AGAIN}"
            )
        each = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        begin = self._start + entry["data_offsets"][0]
        if first == last:
            return torch.empty(0, *shape[1:], dtype=dtype)
        data = self.bytes(begin + first * each, begin + last * each)
        return torch.frombuffer(data, dtype=dtype).view(last - first, *shape[1:])


def require_size(path: Path, record: FileRecord) -> None:
    """Refuse what is not a plain file, or has another size than recorded."""
    with opened(path, "a file of targets", AGAIN) as file:
        size = os.fstat(file.fileno()).st_size
    if size != record.bytes:
        raise UserError(f"{path}: has {size} bytes, the manifest says {record.bytes}. {AGAIN}")


@dataclass
class Shard:
    """A shard, read row by row."""

    file: VerifiedFile
    rows: list[int] = field(init=False)

    def __post_init__(self) -> None:
        missing = [name for name in INDEX if name not in self.file.header]
        if missing:
            raise UserError(f"{self.file.path}: no shard of targets: {missing[0]} is missing. {AGAIN}")
        self.rows = self.file.tensor("rows").tolist()
        self._names = sorted(set(self.file.header) - set(INDEX))

    def row(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the shard's `number`-th row: places_P of its targets, int64, and its tensors for the codec."""
        bits = np.unpackbits(self.file.tensor("places", number, number + 1)[0].numpy(), bitorder="little")
        begin, end = self.file.tensor("offsets", number, number + 2).tolist()
        encoded = {
            name: self.file.tensor(name, first, last)
            for name, first, last in zip(self._names, begin, end, strict=True)
        }
        return torch.from_numpy(np.flatnonzero(bits)), encoded


def flaws(path: Path, record: FileRecord) -> Iterator[str]:
    """What is wrong with a file, read to its last byte; nothing where it is sound."""
    try:
        actual = FileRecord.of(path)
    except UserError as error:
        yield str(error)
        return
    if actual.bytes != record.bytes:
        yield f"{path}: has {actual.bytes} bytes, the manifest says {record.bytes}. {AGAIN}"
    elif actual.sha256 != record.sha256 or actual.blocks != record.blocks:
        wrong = [n for n, (a, b) in enumerate(zip(actual.blocks, record.blocks, strict=False)) if a != b]
        where = f"block {', '.join(map(str, wrong[:8]))}" if wrong else "it"
        yield f"{path}: damaged: {where} is not what was written. {AGAIN}"
