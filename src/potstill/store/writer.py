"""A store of teacher targets in the making: written, resumed after a kill, and merged from parts.

A capture that was killed resumes at the first shard that is not whole. Several writers take disjoint ranges
of shards; the one that finds all of them whole writes the manifest. Two captures of the same settings on one
machine are equal byte for byte.

The order of writing makes every kill harmless. capture.json comes first, so that a folder with anything in
it says what it is of. A file comes before its record, each written aside and renamed, so that a record
stands for a whole file. The manifest comes last, so that a store that can be opened is complete.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from potstill.data.tokenizers import save_tokenizer
from potstill.errors import UserError
from potstill.io.atomic import flush, listed, replace_folder, write_whole, writing
from potstill.io.locks import LOCK, locked
from potstill.io.safe_open import read_object
from potstill.store.layout import (
    CAPTURE,
    CERTIFICATE,
    HEAD,
    HELDOUT,
    MANIFEST,
    MEANS,
    SAME_NATS,
    TOKENIZER,
    Files,
    Json,
    as_json,
    seal,
    texts_gap,
)
from potstill.store.shards import AGAIN, FileRecord, flaws
from potstill.types import Head


class StoreWriter:
    """Writes a store, or resumes one of the same settings. Make one with `open`."""

    def __init__(self, path: Path, settings: Json) -> None:
        self.files = Files(path)
        self.settings = settings

    @classmethod
    def open(cls, path: Path, settings: Json) -> StoreWriter:
        """Start a capture, or resume one that was killed.

        Raises:
            UserError: the folder is of another capture, or of something else.
        """
        place = path / CAPTURE
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        # Writers that start together: one writes the settings, the others compare their own with them.
        with locked(path):
            if place.exists():
                recorded = read_object(place, AGAIN)
                require_equal(path, recorded, settings)
                settings = recorded
            elif {file.name for file in listed(path)} - {LOCK, f"{CAPTURE}.new"}:  # which a kill leaves
                raise UserError(
                    f"{path}: exists and is no capture. Give --out a folder that is not there yet."
                )
            else:
                write_json(place, settings)
        return cls(path, settings)

    @contextmanager
    def exclusive(self, shards: range, first: bool = False) -> Iterator[None]:
        """Refuse a second writer of any of these shards and, for the `first` part, of the files that a store
        has once.
        """
        # POSIX locks on bytes of capture.json: byte 0 for the files that are there once, byte n + 1 for
        # shard n. The file is never replaced, which would leave the lock on an unlinked one, and is not
        # opened again meanwhile: closing any descriptor of it would release the locks of this process.
        descriptor = os.open(self.files.path / CAPTURE, os.O_RDWR)
        begin = shards.start + (0 if first else 1)
        try:
            if count := shards.stop + 1 - begin:  # a length of 0 would lock to the end of the file
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
        """`save` a file unless it is there and whole, and its record."""
        known = self.files.recorded(file)
        # Read again although it has a record: it may have been cut or damaged since.
        if known is not None and not list(flaws(file, known)):
            return known
        record = save(file)
        write_json(self.files.record(file), dataclasses.asdict(record))
        return record

    def write_head(self, head: Head) -> None:
        """weight_VE and bias_V; what else a head has is in the settings."""
        tensors = {"weight": head.weight_VD} | ({} if head.bias_V is None else {"bias": head.bias_V})
        data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self.write(self.files.path / HEAD, lambda file: _save_tensors(file, data))

    def write_tokenizer(self, tokenizer: Any | None) -> None:
        """Whole or not at all, by renaming its folder; so one that is there is complete."""
        if tokenizer is not None and not (self.files.path / TOKENIZER).exists():
            replace_folder(self.files.path / TOKENIZER, partial(save_tokenizer, tokenizer))

    def missing(self, shards: range) -> list[int]:
        """Those of the shards that are not whole."""
        return [n for n in shards if self.files.recorded(self.files.shard(n)) is None]

    def finish(self) -> bool:
        """Write the manifest if every file is there; whether it was."""
        # Writers that end together: without it two would write the manifest, one over the other.
        with locked(self.files.path):
            return write_manifest(self.files.path, self.settings)


def write_manifest(path: Path, settings: Json) -> bool:
    """Join all records into the manifest; False, and nothing written, where a file is missing."""
    files = Files(path)
    once = [path / HELDOUT] if settings["head"] is None else [path / HEAD, path / HELDOUT]
    required = [*once, *(files.shard(n) for n in range(settings["shards"]))]
    records = [files.recorded(file) for file in required]
    if not (path / CERTIFICATE).exists() or any(record is None for record in records):
        return False
    shards = [record for record in records[len(once) :] if record is not None]
    positions = settings["positions"]
    tokenizer = sorted(p for p in (path / TOKENIZER).glob("*") if p.is_file())
    manifest = settings | {
        "bytes_per_position": round(sum(record.bytes for record in shards) / positions, 3),
        "files": [dataclasses.asdict(record) for record in records if record is not None],
        "tokenizer": [dataclasses.asdict(FileRecord.of(file)) for file in tokenizer],
        "certificate": read_object(path / CERTIFICATE, AGAIN),
    }
    write_json(path / MANIFEST, manifest | {"seal": seal(manifest)})
    return True


def merge(folders: Sequence[Path], out: Path) -> int:
    """Copy parts of one capture, written on several machines, into one folder; the number of shards missing.

    Raises:
        UserError: parts of different captures, or a file that does not match its record.
    """
    settings = [read_object(folder / CAPTURE, AGAIN) for folder in folders]
    for folder, other in zip(folders[1:], settings[1:], strict=True):
        require_equal(folder, other, settings[0])
    writer = StoreWriter.open(out, settings[0])
    for folder in folders:
        part = Files(folder)
        for file in sorted(folder.glob("*.safetensors")):
            if (record := part.recorded(file)) is None:
                continue  # its writer was killed; another part, or a later merge, may have it
            for flaw in flaws(file, record):  # before the copy, whose record would vouch for the damage
                raise UserError(flaw)
            writer.write(out / file.name, lambda copy, file=file: _copy_file(file, copy))  # type: ignore[misc]
        if (folder / CERTIFICATE).exists():
            write_whole(out / CERTIFICATE, (folder / CERTIFICATE).read_bytes())
            if (folder / TOKENIZER).is_dir():
                shutil.copytree(folder / TOKENIZER, out / TOKENIZER, dirs_exist_ok=True)
    writer.finish()
    return len(writer.missing(range(settings[0]["shards"])))


def require_equal(path: Path, recorded: Json, settings: Json) -> None:
    """Refuse to mix captures. The path of the teacher may differ between machines; its weights may not."""
    before, now = _flat(recorded), _flat(settings)
    for name in sorted((before | now).keys() - {"teacher.source"}):
        one, other = before.get(name), now.get(name)
        is_same = one == other or name.startswith("commits.")
        if name == f"teacher.{MEANS}":
            is_same = texts_gap(str(one), str(other)) < SAME_NATS
        if not is_same:
            raise UserError(
                f"{path}: captured with another {name}: {one!r:.200}, not {other!r:.200}. Capture with the same, or"
                " give --out another folder."
            )


def _flat(settings: Json) -> Json:
    """Fields of sections by their dotted names."""
    flat: Json = {}
    for name, value in settings.items():
        fields = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{name}.{field}".rstrip("."): one for field, one in fields}
    return flat


def write_json(path: Path, tree: Json) -> None:
    write_whole(path, as_json(tree))


def _save_tensors(file: Path, tensors: dict[str, Tensor]) -> FileRecord:
    write_whole(file, safetensors.torch.save(tensors))
    return FileRecord.of(file)


def _copy_file(source: Path, copy: Path) -> FileRecord:
    """As `write_whole`, without reading the file into memory."""
    beside = copy.with_name(copy.name + ".new")
    with writing(copy):
        shutil.copyfile(source, beside)
        flush(beside)  # to the disk before the rename, or a power cut leaves a name without its data
        os.replace(beside, copy)
    return FileRecord.of(copy)
