"""A finished store of teacher targets: opened, read row by row, and verified to the last byte.

Nothing is read from a store that is not what its manifest says: the manifest has a seal, each mebibyte of a
file a hash that is compared when it is first read. See `layout` for the files, `writer` for how they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from potstill.errors import UserError
from potstill.io.atomic import listed
from potstill.io.safe_open import opened, read_object
from potstill.store.layout import (
    CAPTURE,
    CERTIFICATE,
    HEAD,
    HELDOUT,
    MANIFEST,
    NOT_SETTINGS,
    SCHEMA,
    TOKENIZER,
    Files,
    Json,
    as_json,
    codec_of,
    seal,
)
from potstill.store.shards import AGAIN, FileRecord, Shard, VerifiedFile, flaws, require_size
from potstill.types import Head

ROWS_ADVICE = "Capture with capture.rows: all, or with the train.seed and the steps or epochs of this recipe."


class Store:
    """A finished store, open for reading. Several processes may read one at once.

        store = Store(Path("targets/recipe"))
        places_P, kept = store.row(7)
        targets = store.codec.decode(kept, store.head)

    Raises:
        UserError: no manifest, one of another schema, a broken seal, or a file missing or of another size.
            Contents are verified as they are read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        records = [FileRecord.parse(entry, path / MANIFEST) for entry in self.manifest["files"]]
        self.records = {record.file: record for record in records}
        self.codec = codec_of(self.manifest)
        self.files, self._shards = Files(path), dict[str, Shard]()
        for name, record in self.records.items():
            require_size(path / name, record)

    @property
    def tokenizer_folder(self) -> Path | None:
        """Verified whole, since a library reads it; None for a teacher without a tokenizer."""
        for flaw in _tokenizer_flaws(self.path, self.manifest):
            raise UserError(flaw)
        return self.path / TOKENIZER if self.manifest["tokenizer"] else None

    @cached_property
    def head(self) -> Head | None:
        """The teacher's head, on the CPU and in the dtype that it was captured in; None where there is none."""
        if self.manifest["head"] is None:
            return None
        file = self._file(HEAD)
        kept: Json = self.manifest["head"]
        bias = file.tensor("bias") if "bias" in file.header else None
        return Head(
            file.tensor("weight"), bias, kept["scale"], kept["softcap"], self.manifest["vocabulary"]["ids"]
        )

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """The training rows that were captured, rising; a row's shard is known without opening any."""
        runs = [np.arange(first, last + 1) for first, last in self.manifest["runs"]]
        return np.concatenate([*runs, np.arange(0)])

    def missing(self, rows: Iterable[int]) -> list[int]:
        """Those of the training rows that were not captured."""
        return list(map(int, np.setdiff1d(np.fromiter(rows, np.int64), self.rows)))

    def is_heldout(self, row: int) -> bool:
        """Rows are numbered over both splits, the training rows first."""
        return bool(row >= self.manifest["corpus"]["train_rows"])

    def row(self, row: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Places of a row's targets, places_P in int64, and the tensors that its codec decodes.

        Raises:
            UserError: a row that is not in the store, or a damaged block.
        """
        if self.is_heldout(row):
            name, number = HELDOUT, row - self.manifest["corpus"]["train_rows"]
        else:
            shard, number = divmod(int(np.searchsorted(self.rows, row)), self.manifest["rows_per_shard"])
            name = self.files.shard(shard).name
        holder = self._shard(name) if name in self.records else None
        # The number of a row follows from the manifest; the shard's own list must agree, or its targets
        # would be taken for those of another row.
        if holder is None or holder.rows[number : number + 1] != [row]:
            raise UserError(f"{self.path}: has no targets for row {row}. {ROWS_ADVICE}")
        return holder.row(number)

    def _shard(self, name: str) -> Shard:
        if name not in self._shards:
            self._shards[name] = Shard(self._file(name))
        return self._shards[name]

    def _file(self, name: str) -> VerifiedFile:
        return VerifiedFile(self.path / name, self.records[name])


def read_manifest(path: Path) -> Json:
    """The manifest of a store.

    Raises:
        UserError: none there, one of another schema, or one whose seal does not fit.
    """
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
    """Every flaw of a store, one line each, from all files read to the last byte; none where it is sound."""
    manifest = read_manifest(path)
    entries = {path / FileRecord.parse(entry, path / MANIFEST).file: entry for entry in manifest["files"]}
    settings = {name: manifest[name] for name in manifest if name not in NOT_SETTINGS}
    trees = {path / MANIFEST: manifest, path / CAPTURE: settings, path / CERTIFICATE: manifest["certificate"]}
    for place, tree in (
        trees | {file.with_suffix(".json"): entry for file, entry in entries.items()}
    ).items():
        try:
            with opened(place, "JSON", AGAIN) as file:
                if file.read() != as_json(tree):
                    yield f"{place}: is not what was written. {AGAIN}"
        except UserError as error:
            yield str(error)
    for shard, entry in entries.items():
        yield from flaws(shard, FileRecord.parse(entry, path / MANIFEST))
    yield from _tokenizer_flaws(path, manifest)
    known = {path / TOKENIZER, *entries, *trees, *(file.with_suffix(".json") for file in entries)}
    yield from _unknown(path, known)


def _tokenizer_flaws(path: Path, manifest: Json) -> Iterator[str]:
    folder = path / TOKENIZER
    for entry in manifest["tokenizer"]:
        yield from flaws(folder / entry["file"], FileRecord.parse(entry, path / MANIFEST))
    # A file that was added counts as a flaw: tokenizer libraries read whatever lies beside the others.
    yield from _unknown(folder, {folder / entry["file"] for entry in manifest["tokenizer"]})


def _unknown(folder: Path, known: set[Path]) -> Iterator[str]:
    for entry in listed(folder):
        if folder / entry.name not in known:
            yield f"{folder / entry.name}: not in the manifest. Remove it."
