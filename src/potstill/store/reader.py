"""The folder of targets: what describes it, who may write to it, what is sound in it.

    capture.json            what the targets are of and how they are kept; written first, compared on resume
    tokenizer/              that of the teacher, which read the corpus
    head.safetensors        the teacher's output embedding; scale and softcap are in capture.json
    heldout.safetensors     hidden states of the held-out rows, float32: these are measured against, exactly
    00000.safetensors …     shards of training rows, see `shards`
    00000.json …            bytes and hashes of a shard, written when it is whole
    certificate.json        how far the kept targets are from the full ones, measured on the held-out rows
    manifest.json           all of the above in one, written last: without it there is no store

A capture that was killed goes on with the first shard that is not whole. Several writers take disjoint ranges
of shards; whoever finds all there writes the manifest. Two captures on one machine are equal byte for byte.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.data.tokenizers import save_tokenizer
from potstill.errors import UserError
from potstill.io.atomic import flush, listed, replace_folder, write_whole, writing
from potstill.io.locks import LOCK, locked
from potstill.io.safe_open import opened, read_object
from potstill.store.codecs import Hidden, Kind, Sampled, TopK
from potstill.store.shards import (
    AGAIN,
    BLOCK_BYTES,
    FileRecord,
    Shard,
    VerifiedFile,
    flaws,
    require_size,
)
from potstill.types import Head

SCHEMA = 1
CAPTURE, MANIFEST, CERTIFICATE = "capture.json", "manifest.json", "certificate.json"
HEAD, HELDOUT, TOKENIZER = "head.safetensors", "heldout.safetensors", "tokenizer"
HELDOUT_KIND = Hidden("float32")
ADDED = ("bytes_per_position", "files", "tokenizer", "certificate", "seal")
"""What the manifest has beside the capture's settings."""
Json = dict[str, Any]


def kind_of(settings: Json) -> Kind:
    """How the training rows are kept."""
    kept, ids, temperature = settings["kind"], settings["vocabulary"]["ids"], settings["temperature"]
    match kept["name"]:
        case "hidden":
            return Hidden(kept["dtype"])
        case "sampled":
            return Sampled(kept["threshold"], ids, temperature)
        case _:
            return TopK(kept["k"], kept["dtype"], ids, temperature)


@dataclass(frozen=True)
class Files:
    """Names in a store."""

    path: Path

    def shard(self, number: int) -> Path:
        return self.path / f"{number:05}.safetensors"

    def record(self, file: Path) -> Path:
        return file.with_suffix(".json")

    def recorded(self, file: Path) -> FileRecord | None:
        """What was written about a file once it was whole; None where it is not."""
        place = self.record(file)
        if not (place.exists() and file.exists()):
            return None
        said = read_object(place, AGAIN)
        return _record(said, place)


class StoreWriter:
    """A store in the making. What is there already must be of the same settings."""

    def __init__(self, path: Path, settings: Json) -> None:
        self.files = Files(path)
        self.settings = settings

    @classmethod
    def open(cls, path: Path, settings: Json) -> StoreWriter:
        """Begin, or go on with what a kill cut off.

        Raises:
            UserError: another capture's folder, or one that is no capture's.
        """
        place = path / CAPTURE
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        with locked(path):
            if place.exists():
                begun = read_object(place, AGAIN)
                require_equal(path, begun, settings)
                settings = begun
            elif {file.name for file in listed(path)} - {LOCK, f"{CAPTURE}.new"}:
                raise UserError(
                    f"{path}: exists and is no capture. Give --out a folder that is not there yet."
                )
            else:
                write_json(place, settings)
        return cls(path, settings)

    @contextmanager
    def only(self, shards: range, first: bool = False) -> Iterator[None]:
        """Refuse a second writer of any of these shards; and, for the first part, of what is there once."""
        # Closing any descriptor of a file gives up what POSIX locks a process has on it: of the folder's
        # settings, which nothing opens in between.
        descriptor = os.open(self.files.path / CAPTURE, os.O_RDWR)
        begin = shards.start + (0 if first else 1)  # byte 0 is what is there once, byte n + 1 shard n
        try:
            if count := shards.stop + 1 - begin:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, count, begin)
        except OSError as error:
            os.close(descriptor)
            raise UserError(
                f"{self.files.path}: another process captures shards of {shards.start} to {shards.stop - 1}."
                " Wait for it, or give --part a part of its own."
            ) from error
        try:
            yield
        finally:
            os.close(descriptor)

    def write(self, file: Path, save: Callable[[Path], FileRecord]) -> FileRecord:
        """`save` a file unless it is there and whole."""
        known = self.files.recorded(file)
        if known is not None and not list(flaws(file, known)):
            return known
        record = save(file)
        write_json(self.files.record(file), dataclasses.asdict(record))
        return record

    def write_head(self, head: Head) -> None:
        tensors = {"weight": head.weight_VD} | ({} if head.bias_V is None else {"bias": head.bias_V})
        data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self.write(self.files.path / HEAD, lambda file: _saved(file, data))

    def write_tokenizer(self, tokenizer: Any | None) -> None:
        if tokenizer is not None and not (self.files.path / TOKENIZER).exists():
            replace_folder(self.files.path / TOKENIZER, partial(save_tokenizer, tokenizer))

    def missing(self, shards: range) -> list[int]:
        """Those of the shards that are not whole."""
        return [n for n in shards if self.files.recorded(self.files.shard(n)) is None]

    def finish(self) -> bool:
        """Write the manifest if all is there; whether it was."""
        with locked(self.files.path):
            return write_manifest(self.files.path, self.settings)


def write_manifest(path: Path, settings: Json) -> bool:
    """Of a folder in which every file is whole, with the counts; False where one is missing."""
    files = Files(path)
    wanted = [path / HEAD, path / HELDOUT, *(files.shard(n) for n in range(settings["shards"]))]
    records = [files.recorded(file) for file in wanted]
    if not (path / CERTIFICATE).exists() or any(record is None for record in records):
        return False
    kept = [record for record in records[2:] if record is not None]
    positions = settings["positions"]
    tokenizer = sorted(p for p in (path / TOKENIZER).glob("*") if p.is_file())
    manifest = settings | {
        "bytes_per_position": round(sum(record.bytes for record in kept) / positions, 3),
        "files": [dataclasses.asdict(record) for record in records if record is not None],
        "tokenizer": [dataclasses.asdict(FileRecord.of(file)) for file in tokenizer],
        "certificate": read_object(path / CERTIFICATE, AGAIN),
    }
    write_json(path / MANIFEST, manifest | {"seal": seal(manifest)})
    return True


def seal(manifest: Json) -> str:
    """sha256 of all that a manifest says beside it: a flipped bit may leave other sound JSON."""
    told = {name: value for name, value in manifest.items() if name != "seal"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class Store:
    """A whole store that is read; several processes may read one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        records = [_record(said, path / MANIFEST) for said in self.manifest["files"]]
        self.records = {record.file: record for record in records}
        self.kind = kind_of(self.manifest)
        self.files, self._shards = Files(path), dict[str, Shard]()
        for name, record in self.records.items():
            require_size(path / name, record)

    @property
    def tokenizer_folder(self) -> Path | None:
        for flaw in _tokenizer_flaws(self.path, self.manifest):
            raise UserError(flaw)
        return self.path / TOKENIZER if self.manifest["tokenizer"] else None

    @cached_property
    def head(self) -> Head:
        file = self._file(HEAD)
        kept: Json = self.manifest["head"]
        bias = file.tensor("bias") if "bias" in file.header else None
        return Head(
            file.tensor("weight"), bias, kept["scale"], kept["softcap"], self.manifest["vocabulary"]["ids"]
        )

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """The training rows that were captured, rising; a row's shard is known without looking into any."""
        runs = [np.arange(first, last + 1) for first, last in self.manifest["runs"]]
        return np.concatenate([*runs, np.arange(0)])

    def without(self, rows: Iterable[int]) -> list[int]:
        """Those of the training rows that were not captured."""
        return list(map(int, np.setdiff1d(np.fromiter(rows, np.int64), self.rows)))

    def is_heldout(self, row: int) -> bool:
        return bool(row >= self.manifest["corpus"]["train_rows"])

    def row(self, row: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Places of a row's targets, and what the kind keeps of them.

        Raises:
            UserError: a row that the store has not, or a damaged block.
        """
        if self.is_heldout(row):
            name, number = HELDOUT, row - self.manifest["corpus"]["train_rows"]
        else:
            shard, number = divmod(int(np.searchsorted(self.rows, row)), self.manifest["rows_per_shard"])
            name = self.files.shard(shard).name
        found = self._shard(name) if name in self.records else None
        if found is None or found.rows[number : number + 1] != [row]:
            raise UserError(f"{self.path}: has no targets for row {row}. {ROWS_ADVICE}")
        return found.row(number)

    def _shard(self, name: str) -> Shard:
        if name not in self._shards:
            self._shards[name] = Shard(self._file(name))
        return self._shards[name]

    def _file(self, name: str) -> VerifiedFile:
        return VerifiedFile(self.path / name, self.records[name])


ROWS_ADVICE = "Capture with capture.rows: all, or with the train.seed and train.steps of this recipe."


def read_manifest(path: Path) -> Json:
    place = path / MANIFEST
    if path.is_dir() and not place.exists():
        what = "a capture that is not finished" if (path / CAPTURE).exists() else "not a store of targets"
        raise UserError(
            f"{path}: {what}: it has no {MANIFEST}. `potstill capture RECIPE --out {path}` makes it."
        )
    manifest = read_object(place, AGAIN)
    if manifest.get("schema") != SCHEMA:
        raise UserError(f"{place}: schema {manifest.get('schema')}, this version reads {SCHEMA}. {AGAIN}")
    if manifest.get("seal") != seal(manifest):
        raise UserError(f"{place}: damaged: it is not what was written. {AGAIN}")
    return manifest


def verify(path: Path) -> Iterator[str]:
    """Every flaw of a store, its files read to the last byte; nothing where it is sound."""
    manifest = read_manifest(path)
    records = {path / _record(one, path / MANIFEST).file: one for one in manifest["files"]}
    settings = {name: manifest[name] for name in manifest if name not in ADDED}
    texts = {path / MANIFEST: manifest, path / CAPTURE: settings, path / CERTIFICATE: manifest["certificate"]}
    for place, tree in (texts | {file.with_suffix(".json"): one for file, one in records.items()}).items():
        try:
            with opened(place, "JSON", AGAIN) as file:
                if file.read() != as_json(tree):
                    yield f"{place}: is not what was written. {AGAIN}"
        except UserError as error:
            yield str(error)
    for kept, one in records.items():
        yield from flaws(kept, _record(one, path / MANIFEST))
    yield from _tokenizer_flaws(path, manifest)
    known = {path / TOKENIZER, *records, *texts, *(file.with_suffix(".json") for file in records)}
    yield from _unknown(path, known)


def _tokenizer_flaws(path: Path, manifest: Json) -> Iterator[str]:
    folder = path / TOKENIZER
    for said in manifest["tokenizer"]:
        yield from flaws(folder / said["file"], _record(said, path / MANIFEST))
    yield from _unknown(folder, {folder / said["file"] for said in manifest["tokenizer"]})


def _unknown(folder: Path, known: set[Path]) -> Iterator[str]:
    for entry in listed(folder):
        if folder / entry.name not in known:
            yield f"{folder / entry.name}: not in the manifest. Remove it."


def merge(folders: Sequence[Path], out: Path) -> int:
    """Copy parts of one capture, written on several machines, into one folder; the number of shards missing.

    Raises:
        UserError: parts of different captures, or a file that is not what its part says.
    """
    settings = [read_object(folder / CAPTURE, AGAIN) for folder in folders]
    for folder, other in zip(folders[1:], settings[1:], strict=True):
        require_equal(folder, other, settings[0])
    writer = StoreWriter.open(out, settings[0])
    for folder in folders:
        theirs = Files(folder)
        for file in sorted(folder.glob("*.safetensors")):
            if (record := theirs.recorded(file)) is None:
                continue
            for flaw in flaws(file, record):
                raise UserError(flaw)
            writer.write(out / file.name, lambda place, file=file: _copied(file, place))  # type: ignore[misc]
        if (folder / CERTIFICATE).exists():
            write_whole(out / CERTIFICATE, (folder / CERTIFICATE).read_bytes())
            if (folder / TOKENIZER).is_dir():
                shutil.copytree(folder / TOKENIZER, out / TOKENIZER, dirs_exist_ok=True)
    writer.finish()
    return len(writer.missing(range(settings[0]["shards"])))


def require_equal(path: Path, began: Json, now: Json) -> None:
    """Where the teacher lies may differ from machine to machine; its weights may not."""
    was, is_ = _flat(began), _flat(now)
    for name in sorted((was | is_).keys() - {"teacher.source"}):
        if was.get(name) != is_.get(name):
            raise UserError(
                f"{path}: begun with another {name}: {was.get(name)!r:.200}, not {is_.get(name)!r:.200}."
                " Capture with the same, or give --out another folder."
            )


def _flat(settings: Json) -> Json:
    """Fields of sections by their dotted names."""
    found: Json = {}
    for name, value in settings.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        found |= {f"{name}.{field}".rstrip("."): one for field, one in inner}
    return found


def write_json(path: Path, tree: Json) -> None:
    write_whole(path, as_json(tree))


def as_json(tree: Json) -> bytes:
    return (json.dumps(tree, indent=1) + "\n").encode()


def _record(said: Any, place: Path) -> FileRecord:
    try:
        record = FileRecord(**said)
        sound = len(record.blocks) == -(-record.bytes // BLOCK_BYTES) > 0 and all(
            isinstance(block, str) for block in record.blocks
        )
    except TypeError:
        sound = False
    if not sound or Path(record.file).name != record.file:
        raise UserError(f"{place}: damaged: no record of a file: {said!r:.80}. {AGAIN}")
    return record


def _saved(file: Path, tensors: dict[str, Tensor]) -> FileRecord:
    write_whole(file, safetensors.torch.save(tensors))
    return FileRecord.of(file)


def _copied(file: Path, place: Path) -> FileRecord:
    beside = place.with_name(place.name + ".new")
    with writing(place):
        shutil.copyfile(file, beside)
        flush(beside)
        os.replace(beside, place)
    return FileRecord.of(place)
